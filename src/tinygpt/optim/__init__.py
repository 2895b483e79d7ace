"""Optimizers: Muon for matrices, AdamW for the rest, and the rules that sort parameters between them."""

from tinygpt.optim._muon_adamw import MuonAdamW as MuonAdamW
from tinygpt.optim._nanochat_rules import nanochat_rules as nanochat_rules
from tinygpt.optim._param_groups import Rule as Rule
from tinygpt.optim._param_groups import param_groups as param_groups
from tinygpt.optim._polar import orthogonalize as orthogonalize
from tinygpt.optim._updates import adamw_update as adamw_update
from tinygpt.optim._updates import muon_update as muon_update

__all__ = ["MuonAdamW", "Rule", "adamw_update", "muon_update", "nanochat_rules", "orthogonalize", "param_groups"]
