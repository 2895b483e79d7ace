"""Saving, loading and publishing a model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from tinygpt import hub
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.manifest import MANIFEST_FILE
from tinygpt.model._config import GPTConfig
from tinygpt.model._files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_blocks,
    check_device,
    check_dtype,
    check_tokenizer,
    describe_blocks,
    load_weights,
    read_config,
    write_model,
)
from tinygpt.model._parts import PartFactory
from tinygpt.tokenizer import Tokenizer

_PARTS = ("mlp", "attention", "block")


class PretrainedFiles(nn.Module):
    """What `GPT` does with files: a base class only so that the maths can be read without it."""

    config: GPTConfig | None
    blocks: nn.ModuleList

    @classmethod
    def from_config(
        cls,
        config: GPTConfig,
        *,
        mlp: PartFactory | None = None,
        attention: PartFactory | None = None,
        block: PartFactory | None = None,
    ) -> Self:
        """Build a model; `GPT` does."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write `config.json` and `model.safetensors`; existing ones are replaced only when the new ones are whole.

        Args:
            folder: Where; made if it is missing.
            tokenizer: Saved beside them, so that `load_tokenizer` finds it in the same folder.

        Raises:
            ConfigError: If the model was assembled without a config, or the tokenizer is none or has more ids.
            CheckpointError: If the folder is a checkpoint of a run, or a file cannot be written.
        """
        folder = Path(folder)
        if self.config is None:
            raise ConfigError("this GPT was assembled without a config: give GPT(config=...) to save it.")
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.config)
        if (folder / MANIFEST_FILE).exists():  # whose hashes would then be wrong
            raise CheckpointError(f"{folder} is a checkpoint, which is written as a whole; choose another folder.")
        # Blocks that torch.compile wrapped one by one are saved under the names of the blocks.
        weights = {name.replace("._orig_mod", ""): tensor for name, tensor in self.state_dict().items()}
        write_model(folder, self.config, describe_blocks(self.blocks), weights)
        if tokenizer is not None:
            tokenizer.save(folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        **parts: PartFactory,
    ) -> Self:
        """Load a model from a folder or from the Hugging Face Hub; every weight must be there, and no other.

        Args:
            name_or_path: A folder that `save_pretrained` or a checkpoint wrote, or `user/repository`.
            revision: Branch, tag or commit of the repository.
            device: Where to put the weights.
            dtype: Cast the weights; `None` keeps what was saved.
            cache_dir: Where downloads are kept.
            local_files_only: Never ask the network.
            token: Access token for a private repository.
            **parts: The factories the model was built with, as for `from_config`.

        Raises:
            ConfigError: If device or dtype is none that torch can put weights in, or a part has another name.
            HubError: If it is neither a folder nor a repository that can be read.
            CheckpointError: If a file is missing or damaged, or names or shapes do not fit.

        Example:
            ```python
            model = GPT.from_pretrained("user/repo", revision="step-87000", dtype=torch.bfloat16)
            ```
        """
        device = check_device(device)
        if unknown := parts.keys() - set(_PARTS):
            raise ConfigError(
                f"from_pretrained has no argument {min(unknown)!r}; besides revision, device, dtype, cache_dir, "
                f"local_files_only and token it takes the parts {', '.join(_PARTS)}."
            )
        check_dtype(dtype)
        folder = hub.resolve(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        config = read_config(folder)
        try:
            with torch.device("meta"):
                model = cls.from_config(config, **parts)
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} describes a model that cannot be built: {error}.") from None
        check_blocks(folder, describe_blocks(model.blocks))
        load_weights(model, folder / WEIGHTS_FILE, device, dtype)
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        card: str | None = None,
        private: bool = False,
        branch: str | None = None,
        commit_message: str | None = None,
        tags: str | Sequence[str] = (),
        token: str | None = None,
    ) -> str:
        """Upload model and tokenizer in one commit; return its address.

        Args:
            repo_id: `user/repo`, made if it is missing.
            folder: Save here first, and upload all that is in it. `None` takes a folder that is gone afterwards.
            tokenizer: Goes along, so that others can encode for the model.
            card: The text of `README.md`; `tinygpt.publish.model_card` writes it from the record of a run.
            private: Create the repository as private. An existing public one is refused, not made private.
            branch: Branch to commit to, made if it is missing. `None` is the main branch.
            commit_message: First line of the commit.
            tags: One or several tags for the commit, such as `"step-87000"`; a tag on another model is an error.
            token: Access token with write permission. `None` is the one the client is logged in with.

        Raises:
            ConfigError: If the model was assembled without a config, or the tokenizer does not fit.
            CheckpointError: If the folder is a checkpoint of a run, or cannot be written.
            HubError: If a name is none, access is refused, a tag is taken, or the upload fails after bounded retries.

        Example:
            ```python
            model.push_to_hub("user/repo", tokenizer=tokenizer, private=True, tags="step-87000")
            ```
        """
        hub.check_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary if folder is None else folder)
            self.save_pretrained(target, tokenizer)
            if card is not None:
                (target / "README.md").write_text(card, encoding="utf-8", newline="\n")
            return hub.upload_folder(
                target,
                repo_id,
                private=private,
                branch=branch,
                commit_message=commit_message or "Upload model",
                tags=tags,
                token=token,
            )
