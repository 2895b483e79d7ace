"""Checkpoints as models on the Hub: a card from the run's own record, and pushes that no failure loses."""

from tinygpt.publish._card import model_card as model_card
from tinygpt.publish._pending import PendingPush as PendingPush
from tinygpt.publish._pending import finish_pushes as finish_pushes
from tinygpt.publish._pending import pending_pushes as pending_pushes
from tinygpt.publish._push import files_to_push as files_to_push
from tinygpt.publish._push import push_model as push_model
from tinygpt.publish._queue import PushQueue as PushQueue
from tinygpt.publish._record import choose_checkpoint as choose_checkpoint

__all__ = [
    "PendingPush",
    "PushQueue",
    "choose_checkpoint",
    "files_to_push",
    "finish_pushes",
    "model_card",
    "pending_pushes",
    "push_model",
]
