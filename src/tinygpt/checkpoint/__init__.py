"""The whole state of a run on disk: written beside and renamed, hashed, verified before anything is used.

A checkpoint is a folder in the `checkpoints` folder of a run:

```
checkpoints/
  latest                            name of the newest complete checkpoint: a hint for people and scripts
  step-000500/
    model.safetensors, config.json  loadable on their own by GPT.from_pretrained
    tokenizer files                 if the run has a tokenizer
    optimizer.safetensors           optimizer moments
    state.safetensors               packing buffer, random states
    state.json                      everything else: step, schedules, rates, fingerprints, versions
    manifest.json                   size and sha256 of each file, versions of format, tinygpt and torch;
                                    without it the folder is not a checkpoint
```

No file holds code: JSON and safetensors only. Sizes that a file declares are compared with the file before memory is
asked for, and nothing is written or deleted through a link.
"""

from tinygpt.checkpoint._folders import checkpoint_folder as checkpoint_folder
from tinygpt.checkpoint._folders import checkpoint_step as checkpoint_step
from tinygpt.checkpoint._folders import latest_checkpoint as latest_checkpoint
from tinygpt.checkpoint._folders import list_checkpoints as list_checkpoints
from tinygpt.checkpoint._folders import mark_latest as mark_latest
from tinygpt.checkpoint._folders import remove_old_checkpoints as remove_old_checkpoints
from tinygpt.checkpoint._folders import set_aside as set_aside
from tinygpt.checkpoint._plain import StateSnapshot as StateSnapshot
from tinygpt.checkpoint._plain import take_apart as take_apart
from tinygpt.checkpoint._read import STATE_FILE as STATE_FILE
from tinygpt.checkpoint._read import load_state as load_state
from tinygpt.checkpoint._read import load_tensors as load_tensors
from tinygpt.checkpoint._read import verify as verify
from tinygpt.checkpoint._run_folder import RUN_FILE as RUN_FILE
from tinygpt.checkpoint._run_folder import RunLock as RunLock
from tinygpt.checkpoint._run_folder import claim_run_folder as claim_run_folder
from tinygpt.checkpoint._snapshot import SnapshotMemory as SnapshotMemory
from tinygpt.checkpoint._write import save_state as save_state

__all__ = [
    "RUN_FILE",
    "STATE_FILE",
    "RunLock",
    "SnapshotMemory",
    "StateSnapshot",
    "checkpoint_folder",
    "checkpoint_step",
    "claim_run_folder",
    "latest_checkpoint",
    "list_checkpoints",
    "load_state",
    "load_tensors",
    "mark_latest",
    "remove_old_checkpoints",
    "save_state",
    "set_aside",
    "take_apart",
    "verify",
]
