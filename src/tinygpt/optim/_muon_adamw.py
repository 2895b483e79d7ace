"""Muon for matrices and AdamW for the rest, as one torch optimizer."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from tinygpt.compiler import compiler_problem
from tinygpt.errors import ConfigError
from tinygpt.optim._groups import checked_group
from tinygpt.optim._named_state import VERSION, matching_groups, state_layout
from tinygpt.optim._param_groups import default_groups
from tinygpt.optim._polar import fast_dtype
from tinygpt.optim._rounding import rounding_seed
from tinygpt.optim._updates import adamw_update, muon_update

# Matrices of one shape are updated together in stacks of at most this many elements (16 MiB in float32). A Muon step
# needs about five such stacks of temporary memory: some 7 % of a 286 M parameter model. One small matrix at a time does
# not keep a GPU busy; on two CPU cores stacks of 4 MiB were as fast, or faster, and took less.
_STACK_ELEMENTS = 2**22
_STACK_ELEMENTS_ON_CPU = 2**20


@dataclass
class _Stack:
    """Matrices of one shape, and their state in one tensor each: slice `i` belongs to `params[i]`."""

    params: list[Tensor]
    momentum: Tensor
    second_moment: Tensor


class MuonAdamW(torch.optim.Optimizer):
    """Train matrices with Muon and everything else with AdamW.

    A group is a dict with `params`, a list of `(name, parameter)` pairs, its `kind`, its `lr`, and options:

    | kind | option | default | |
    |---|---|---|---|
    | `"adamw"` | `betas` | (0.9, 0.95) | decay of the two moments |
    | | `eps` | 1e-8 | added to the root of the second moment |
    | | `weight_decay` | 0.0 | decoupled, times `lr` |
    | | `first_moment` | "float32" | or "bfloat16", which halves it |
    | | `second_moment` | "element" | one a number, or "row": one a row of a table |
    | | `stochastic_rounding` | False | for parameters stored in bfloat16, see below |
    | `"muon"` | `momentum` | 0.95 | Nesterov momentum |
    | | `beta2` | 0.9 | decay of the second moment of NorMuon |
    | | `weight_decay` | 0.0 | cautious, times `lr` |
    | | `polar_steps` | 5 | iterations of the orthogonalization |
    | | `polar_dtype` | "auto" | dtype of its products; "float32", "bfloat16", or what the device does fast and well |
    | | `row_equilibration` | False | one norm for all rows before it (MuonEq) |
    | | `norm_renormalization` | False | fixed Frobenius norm after it (Muon+) |

    Build groups with [`param_groups`][tinygpt.optim.param_groups] and rules, by hand, or let `for_model` choose. It is
    a `torch.optim.Optimizer`: torch's learning-rate schedulers (the cyclic ones with `cycle_momentum=False`),
    `zero_grad`, `add_param_group` and `deepcopy` work. A group remembers its `initial_lr` and `initial_weight_decay`
    for schedules to multiply. A parameter without gradient is left alone, its state too. Parameters stored in bfloat16
    are updated in float32 and keep float32 state; the result is rounded, so changes under 0.4 % of a weight are lost:
    fine for embeddings, wrong for matrices. `stochastic_rounding` keeps them on average: it rounds up or down
    by chance. Its noise follows from the parameter's name and step alone, so a resumed run repeats it.

    Tables hold most of a small model's parameters, and two options shrink their state, together to a quarter:
    `second_moment="row"` keeps a second moment for each row, a token, and not for each number;
    `first_moment="bfloat16"` stores the mean of the gradients in two bytes and computes in float32. With a beta of 0.8
    or 0.9 a fifth or a tenth of it is new at each step, so what rounding takes, 0.4 % at most, does not add up.

    Args:
        params: The groups.
        compile: Compile the Muon update with `torch.compile`, at the first step. It saves memory traffic on a GPU
            after some seconds of compilation for each shape. `"auto"` does so on CUDA alone and where a small function
            compiles; with `True` a compiler that does not work is warned of, and the update runs without.

    Raises:
        ConfigError: If a group is not usable; the message names the parameters.

    References:
        [`muon_update`][tinygpt.optim.muon_update] and [`adamw_update`][tinygpt.optim.adamw_update] name the papers.

    Example:
        ```python
        optimizer = MuonAdamW(
            [
                {"params": matrices, "kind": "muon", "lr": 0.02, "weight_decay": 0.1},
                {"params": others, "kind": "adamw", "lr": 3e-4},
            ]
        )
        ```
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, compile: bool | Literal["auto"] = False) -> None:
        groups = list(params)
        if not groups or not all(isinstance(group, dict) for group in groups):
            raise ConfigError(
                "MuonAdamW needs a list of groups, each a dict with params, kind and lr. "
                "For a model use MuonAdamW.for_model(model)."
            )
        if not (isinstance(compile, bool) or compile == "auto"):
            raise ConfigError(f"compile={compile!r} is not known; choose True, False or 'auto'.")
        self.compile = compile
        self._reset_caches()
        super().__init__(groups, defaults={})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        lr: float = 0.02,
        adamw_lr: float = 3e-4,
        weight_decay: float = 0.1,
        adamw_weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_names: Sequence[str] = (),
        compile: bool | Literal["auto"] = False,
    ) -> Self:
        """Build the optimizer for any module.

        Weights with two axes go to Muon. To AdamW go embeddings and the head, which see single rows and not a whole
        space of inputs, whatever has one axis, or three and more (norms, biases, convolutions), and single rows.
        An embedding is an `nn.Embedding`, a tensor tied to one, or a parameter with "embed" or "emb" in its name; a
        head is what [`param_groups`][tinygpt.optim.param_groups] takes for one.

        Args:
            model: Any module; parameters with `requires_grad=False` are left out.
            lr: Learning rate of the matrices. A Muon update has a known size, so 0.02 suits most models.
            adamw_lr: Learning rate of the rest, as for plain AdamW.
            weight_decay: Weight decay of the matrices.
            adamw_weight_decay: Weight decay of the rest.
            momentum: Momentum of the matrices.
            betas: Betas of the rest.
            adamw_names: Patterns as in [`Rule`][tinygpt.optim.Rule] of further matrices for AdamW, such as the last
                layer of a classifier.
            compile: As for the class.

        Raises:
            ConfigError: If nothing can be trained, a pattern matches nothing, or an option is not usable.

        Example:
            ```python
            optimizer = MuonAdamW.for_model(model, lr=0.02, adamw_lr=3e-4)
            ```
        """
        muon: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        adamw: dict[str, Any] = {"lr": adamw_lr, "weight_decay": adamw_weight_decay, "betas": betas}
        return cls(default_groups(model, muon=muon, adamw=adamw, adamw_names=adamw_names), compile=compile)

    def _reset_caches(self) -> None:
        # Stacks are built from the state at the next step, so loading, copying and unpickling need nothing more.
        self._stacks: dict[int, list[_Stack]] = {}
        self._compiled: Callable[..., None] | None = None
        self._compiles: dict[torch.device, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compile": self.compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in the constructor.

        Raises:
            ConfigError: If the group is not usable; the message names the parameters.
        """
        super().add_param_group(checked_group(param_group, self.param_groups))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients anew, as in torch.

        Returns:
            What the closure returned, or None.

        Raises:
            ConfigError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _refuse_sparse(group)
        for index, group in enumerate(self.param_groups):
            if group["kind"] == "muon":
                if index not in self._stacks:
                    self._stacks[index] = self._build_stacks(group)
                for stack in self._stacks[index]:
                    self._step_stack(group, stack)
            else:
                self._step_adamw(group)
        return loss

    def _step_adamw(self, group: dict[str, Any]) -> None:
        named = [
            (name, param)
            for name, param in zip(group["param_names"], group["params"], strict=True)
            if param.grad is not None
        ]
        params = [param for _, param in named]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = 0
                for key, (shape, dtype) in state_layout(group, param).items():
                    like = param if shape == param.shape else param.new_empty(shape)
                    state[key] = torch.zeros_like(like, dtype=dtype)
            state["step"] += 1
        adamw_update(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            rounding_seeds=[rounding_seed(name, self.state[param]["step"]) for name, param in named]
            if group["stochastic_rounding"]
            else None,
        )

    def _build_stacks(self, group: dict[str, Any]) -> list[_Stack]:
        """Stack equal matrices, taking over the state they have, and make their state views of the stack."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in group["params"]:
            alike.setdefault((param.shape, param.dtype, param.device), []).append(param)
        stacks = []
        for params in alike.values():
            most = _STACK_ELEMENTS_ON_CPU if params[0].is_cpu else _STACK_ELEMENTS
            count = max(1, most // max(1, params[0].numel()))
            for start in range(0, len(params), count):
                members = params[start : start + count]
                like = members[0]
                buffers = {
                    key: torch.zeros(len(members), *shape, dtype=dtype, device=like.device)
                    for key, (shape, dtype) in state_layout(group, like).items()
                }
                for index, param in enumerate(members):
                    state = self.state[param]
                    state.setdefault("step", 0)
                    for key, buffer in buffers.items():
                        if key in state:
                            buffer[index].copy_(state[key])
                        state[key] = buffer[index]
                stacks.append(_Stack(members, **buffers))
        return stacks

    def _step_stack(self, group: dict[str, Any], stack: _Stack) -> None:
        present = [index for index, param in enumerate(stack.params) if param.grad is not None]
        if not present:
            return
        params = [stack.params[index] for index in present]
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            self.state[param]["step"] += 1
        whole = len(present) == len(stack.params)
        momentum = stack.momentum if whole else stack.momentum[present]
        second_moment = stack.second_moment if whole else stack.second_moment[present]
        rates = {key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay")}
        dtype = group["polar_dtype"]
        update = muon_update
        if self._is_compiled_on(momentum.device):
            update = self._compiled = self._compiled or torch.compile(muon_update, dynamic=False)
            # As numbers they would be constants of the compiled code, and every scheduled change a new compilation.
            rates = {key: torch.tensor(value, dtype=momentum.dtype) for key, value in rates.items()}
        update(
            params,
            grads,
            momentum,
            second_moment,
            **rates,
            polar_steps=group["polar_steps"],
            row_equilibration=group["row_equilibration"],
            norm_renormalization=group["norm_renormalization"],
            polar_dtype=fast_dtype(momentum) if dtype == "auto" else getattr(torch, dtype),
        )
        if not whole:
            stack.momentum[present] = momentum
            stack.second_moment[present] = second_moment

    def _is_compiled_on(self, device: torch.device) -> bool:
        if device not in self._compiles:
            wanted = self.compile is True or (self.compile == "auto" and device.type == "cuda")
            problem = compiler_problem(device) if wanted else None
            if problem is not None and self.compile is True:
                warnings.warn(f"the Muon update is not compiled: {problem}", stacklevel=2)
            self._compiles[device] = wanted and problem is None
        return self._compiles[device]

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter name.

        Returns:
            `{"version": 1, "state": {name: {"step": int, tensor names: tensors}}, "param_groups": [options with
            "params": names]}`. Muon keeps `momentum` and `second_moment`, AdamW `exp_avg` and `exp_avg_sq`; a
            parameter that was never updated has only its step, 0. All but the tensors can be written as JSON. As with
            torch the tensors are the live ones: clone them to keep them while training goes on.
        """
        state: dict[str, dict[str, Any]] = {}
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                entry = self.state.get(param, {})
                state[name] = dict(entry) if entry.get("step", 0) > 0 else {"step": 0}
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            | {"params": list(group["param_names"])}
            for group in self.param_groups
        ]
        return {"version": VERSION, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state and its hyper-parameters; the order of groups and parameters does not matter.

        Args:
            state_dict: What `state_dict` returned, also after a round trip of its tensors through a file and of the
                rest through JSON. Tensors are copied.

        Raises:
            CheckpointError: If the version, the names, the grouping, a kind, a shape or a dtype differs. Nothing has
                been changed then.
        """
        matched = matching_groups(self.param_groups, state_dict)
        self.state.clear()
        self._stacks = {}
        for group, saved in zip(self.param_groups, matched, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            if "betas" in group:
                group["betas"] = tuple(group["betas"])
            for name, param in zip(group["param_names"], group["params"], strict=True):
                entry = state_dict["state"][name]
                if entry["step"] > 0:
                    self.state[param] = {
                        key: value.to(param.device, copy=True).contiguous() if isinstance(value, Tensor) else value
                        for key, value in entry.items()
                    }


def _refuse_sparse(group: dict[str, Any]) -> None:
    names = [
        name
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if param.grad is not None and param.grad.layout != torch.strided
    ]
    if names:
        raise ConfigError(f"MuonAdamW cannot use sparse gradients: {', '.join(names)}. Build with sparse=False.")
