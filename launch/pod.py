"""torchrun in a pod, with an exit code that says whether to start the pod again.

Usage: `python launch/pod.py [options of torchrun] launch/train.py --config F`. torchrun ends with 1
whatever its ranks end with. This program ends with 2 if a rank did, because something has to be
changed, and otherwise with 138: a rank or another pod was lost, and the run goes on when started
again. The `podFailurePolicy` of launch/kubernetes.yaml starts pods again unless the code is 2.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

CHANGE_NEEDED = 2
RETRY = 138

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        sys.exit(CHANGE_NEEDED if CHANGE_NEEDED in codes else RETRY)
    except SignalException as signal:
        sys.exit(128 + signal.sigval)
