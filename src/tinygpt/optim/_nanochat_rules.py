"""The groups of the documented run."""

from typing import Any, Literal

from tinygpt._numbers import check_real
from tinygpt.errors import ConfigError
from tinygpt.optim._param_groups import Rule

# Recorded from nanochat. Its eps is small enough to make an AdamW update independent of the gradient's scale.
_EPS = 1e-10
_SMEAR_AND_BACKOUT_LR = 0.2


def nanochat_rules(
    *,
    model_dim: int,
    batch_lr_scale: float = 1.0,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.3,
    unembedding_lr: float = 0.008,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.28,
    row_equilibration: bool = False,
    norm_renormalization: bool = False,
    table_first_moment: Literal["float32", "bfloat16"] = "float32",
    table_second_moment: Literal["element", "row"] = "element",
    stochastic_rounding: bool = False,
) -> list[Rule]:
    """Build the rules for the parameter names of `tinygpt.GPT`, with nanochat's settings.

    All rules are optional, so a model with features switched off passes; a parameter they do not know is an error of
    [`param_groups`][tinygpt.optim.param_groups].

    Args:
        model_dim: Width of the residual stream. Rates of embeddings and head are multiplied by
            `(model_dim / 768) ** -0.5`.
        batch_lr_scale: Factor on all rates but the fixed ones of smear and backout (0.2), for a batch that is not
            the reference one: `tinygpt.scaling.lr_factor`.
        matrix_lr: Rate of the matrices (Muon), the gates of the value embeddings among them.
        embedding_lr: Rate of the token embedding; value embeddings take half of it.
        unembedding_lr: Rate of the head.
        scalar_lr: Rate of the x0 scales. Residual scales and learned norm weights, which start near one and multiply
            the whole stream, take a hundredth of it.
        weight_decay: Cautious weight decay of the matrices.
        row_equilibration: As in [`MuonAdamW`][tinygpt.optim.MuonAdamW]; off in the documented run.
        norm_renormalization: As in [`MuonAdamW`][tinygpt.optim.MuonAdamW]; off in the documented run.
        table_first_moment: The `first_moment` of token and value embeddings; "float32" here, while nanochat takes the
            dtype of the table, bfloat16.
        table_second_moment: The `second_moment` of token and value embeddings: one a number, or one a row to save
            memory; "element" in the documented run.
        stochastic_rounding: Of token and value embeddings that are stored in bfloat16; off in the documented run.

    Returns:
        The rules, first match wins.

    Raises:
        ConfigError: If `model_dim` is not positive, or a moment of the tables is something else.

    Example:
        ```python
        optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=768)))
        ```
    """
    check_real(
        model_dim=model_dim,
        batch_lr_scale=batch_lr_scale,
        matrix_lr=matrix_lr,
        embedding_lr=embedding_lr,
        unembedding_lr=unembedding_lr,
        scalar_lr=scalar_lr,
        weight_decay=weight_decay,
    )
    if model_dim <= 0:
        raise ConfigError(f"model_dim={model_dim} must be positive.")
    if table_first_moment not in ("float32", "bfloat16"):
        raise ConfigError(f"table_first_moment={table_first_moment!r} is not known; choose 'float32' or 'bfloat16'.")
    if table_second_moment not in ("element", "row"):
        raise ConfigError(f"table_second_moment={table_second_moment!r} is not known; choose 'element' or 'row'.")
    width_scale = batch_lr_scale * (model_dim / 768) ** -0.5
    embedding = embedding_lr * width_scale
    scalar = scalar_lr * batch_lr_scale
    muon = {
        "lr": matrix_lr * batch_lr_scale,
        "momentum": 0.95,
        "beta2": 0.9,
        "weight_decay": weight_decay,
        "row_equilibration": row_equilibration,
        "norm_renormalization": norm_renormalization,
    }
    matrices = (
        "blocks.*.attention.?_proj.weight",
        "blocks.*.mlp.*_proj.weight",
        "blocks.*.attention.value_gate.weight",
    )
    table: dict[str, Any] = {
        "first_moment": table_first_moment,
        "second_moment": table_second_moment,
        "stochastic_rounding": stochastic_rounding,
    }
    return [
        _adamw("head.weight", unembedding_lr * width_scale, (0.8, 0.96), 0.01),
        _adamw("embedding.weight", embedding, (0.8, 0.995), 0.001, **table),
        _adamw("blocks.*.attention.value_embedding.weight", embedding * 0.5, (0.8, 0.995), 0.01, **table),
        _adamw("blocks.*.residual_scale", scalar * 0.01, (0.8, 0.95), 0.05),
        _adamw("blocks.*.x0_scale", scalar, (0.96, 0.95), 0.0),
        _adamw(("smear.gate.weight", "smear.scale", "backout.scale"), _SMEAR_AND_BACKOUT_LR, (0.8, 0.95), 0.0),
        # nanochat has no learned norms; decaying a gain would pull it to zero.
        _adamw("*norm.weight", scalar * 0.01, (0.8, 0.95), 0.0, ndim=1),
        Rule(matrices, kind="muon", options=muon, ndim=2, optional=True),
    ]


def _adamw(
    pattern: str | tuple[str, ...],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    ndim: int | None = None,
    **more: Any,
) -> Rule:
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": _EPS, "weight_decay": weight_decay, **more}
    return Rule(pattern, kind="adamw", options=options, ndim=ndim, optional=True)
