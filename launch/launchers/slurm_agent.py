"""One torchrun for each Slurm node: ``srun python -m launch.launchers.slurm_agent -m torch.distributed.run …``.

srun gives every task the same arguments, so the node's rank is passed on as a variable.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["PET_NODE_RANK"] = os.environ["SLURM_NODEID"]
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
