"""The methods: one file each, with a frozen config and `run(config, lab)`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megakd.methods import finetune, single
from megakd.methods.finetune import FinetuneConfig
from megakd.methods.single import SingleConfig

MethodConfig = Annotated[FinetuneConfig | SingleConfig, Field(discriminator="name")]
METHODS = {"finetune": finetune, "single": single}
