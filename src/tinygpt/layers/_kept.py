"""What layers may do about what autograd keeps for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks


def takes_own_backward() -> bool:
    """Return whether a function with a backward pass of its own may stand here.

    Not without gradients; nor under the compiler, which sees the whole graph and chooses better; nor inside of
    `torch.func` and forward differentiation, which cannot take such functions.
    """
    # Private, so asked for: torch refuses such a function inside of torch.func by itself.
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not (transforms is not None and transforms())
        and getattr(forward_ad, "_current_level", -1) < 0
    )


def computes_plainly(*grads: Tensor) -> bool:
    """Return whether a backward pass has to do without results written in place: it is differentiated, or batched."""
    # Private, so asked for: gradients of several results at once (is_grads_batched) take no `out=`.
    batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return torch.is_grad_enabled() or batched is None or any(map(batched, grads))


def graph_stays() -> bool:
    """Return whether the backward pass that runs leaves its graph, and all that it keeps, to others."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return torch.compiler.is_compiling() or kept is None or bool(kept())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of this very class, and nothing else happens when it is called."""
    return type(module) is kind and "forward" not in module.__dict__ and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Return whether hooks, its own or those of all modules, see what this module takes or returns, or gradients."""
    kinds = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    return any(getattr(module, f"_{kind}") or getattr(nn.modules.module, f"_global_{kind}") for kind in kinds)


def others_choose_what_is_kept() -> bool:
    """Return whether hooks into what autograd keeps are forbidden, or somebody's, as those of checkpointing.

    Those of `made_again` are nobody else's: inside of them a smaller part may have its own.
    """
    # Private as well. Hooks inside of theirs take nothing from the result, but from what theirs save.
    enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
    hooks = _hooks()
    return not enabled() or (hooks is not None and not _are_ours(hooks))


def _hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the innermost hooks into what autograd keeps; `None` if there are none."""
    innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if innermost is None else innermost(True)


def _are_ours(hooks: tuple[Any, Any] | None) -> bool:
    # Not every callable tells where it is from: methods of torch's own tensors do not.
    return hooks is not None and getattr(hooks[0], "__module__", None) == __name__


def made_again(result: Tensor, make: Callable[[], Tensor], *, of: Sequence[Tensor] = ()) -> saved_tensors_hooks:
    """Return a context in which whoever keeps `result` for the backward pass makes it again there instead.

    It says nothing of what is done with the result, so it holds for any layer that takes it. Inside of another such
    context both hold.

    Args:
        result: What not to keep.
        make: Returns an equal tensor; it may not hold on to `result`. What it asks a module for may be another
            parameter by then, as after `torch.func.functional_call`: let it hold on to that of the forward pass.
        of: Tensors it is made of, which have to stay as they are until then.
    """
    # What autograd keeps holds on to these functions, so they may not hold on to the result. Not the address of its
    # memory, which is 0 for everything on the meta device.
    storage, dtype, version = result.untyped_storage()._cdata, result.dtype, result._version
    of = [source for source in of if not source.is_inference()]  # these have no version
    versions = [source._version for source in of]
    made: list[Tensor] = []  # for all who kept it; it goes when the last of them is done
    outer = _hooks()  # torch asks the innermost alone
    outer = outer if _are_ours(outer) else None

    def pack(kept: Tensor) -> Any:
        # Of another version it is another result: a layer changed it in place.
        alike = kept.layout == torch.strided and kept.dtype == dtype and kept._version == version
        if alike and kept.untyped_storage()._cdata == storage:
            return None, kept.shape, kept.stride(), kept.storage_offset()
        # Detached: a node that keeps its own result would hold on to itself, and nothing could free the two.
        return (_OUTER, outer[0](kept)) if outer else (kept.detach(), kept._version)

    def unpack(packed: Any) -> Tensor:
        kept, *rest = packed
        if outer and kept is _OUTER:
            return outer[1](*rest)
        if kept is None:
            if versions != [source._version for source in of]:
                raise RuntimeError(_CHANGED)
            with torch.no_grad():
                made[:] = made or [make()]
                return made[0].as_strided(*rest)
        if kept._version != rest[0]:  # which autograd looks at by itself only without hooks
            raise RuntimeError(_CHANGED)
        return kept

    return saved_tensors_hooks(pack, unpack)


def with_its_parameters(module: nn.Module, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a module, or a function that reads one, such that it cannot be repeated with other parameters.

    Checkpointing repeats it with what it finds in the module by then, which after `torch.func.functional_call` is not
    what was given to that call: gradients would be those of other weights, unsaid.
    """
    call = module if function is None else function
    if torch.compiler.is_compiling():  # what is traced holds on to its inputs
        return call
    parameters = [*module.parameters()]

    def repeatable(*args: Any, **kwargs: Any) -> Any:
        if [*map(id, module.parameters())] != [*map(id, parameters)]:
            raise RuntimeError(_REPLACED)
        return call(*args, **kwargs)

    return repeatable


_OUTER = object()
_REPLACED = (
    "the backward pass computes a layer again, which no longer has the parameters of the forward pass; for "
    "torch.func.functional_call set_activation_checkpointing('none')."
)
_CHANGED = (
    "what a layer kept for the backward pass was changed in place before that pass; "
    "change weights after it, and results out of place."
)
