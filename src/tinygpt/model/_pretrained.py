"""Saving, loading and publishing a model."""

from pathlib import Path
from typing import Self

import torch
from torch import nn

from tinygpt import hub
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.model._config import GPTConfig
from tinygpt.model._files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_blocks,
    describe_blocks,
    load_weights,
    read_config,
    write_model,
)
from tinygpt.model._parts import PartFactory


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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; existing ones are replaced only when the new ones are whole.

        Raises:
            ConfigError: If the model was assembled without a config.
        """
        if self.config is None:
            raise ConfigError("this GPT was assembled without a config: give GPT(config=...) to save it.")
        # Blocks that torch.compile wrapped one by one are saved under the names of the blocks.
        weights = {name.replace("._orig_mod", ""): tensor for name, tensor in self.state_dict().items()}
        write_model(Path(folder), self.config, describe_blocks(self.blocks), weights)

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
            HubError: If it is neither a folder nor a repository that can be read.
            CheckpointError: If a file is missing or damaged, or names or shapes do not fit.
        """
        folder = hub.resolve(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        config = read_config(folder)
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"dtype {dtype} is not a floating-point dtype; use torch.bfloat16 for example.")
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
        folder: str | Path,
        private: bool = False,
        branch: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Save into `folder` and upload it; return the address of the commit.

        Raises:
            ConfigError: If the model was assembled without a config.
            HubError: If the name is not one, or the upload fails after bounded retries.
        """
        hub.check_repo_id(repo_id)
        self.save_pretrained(folder)
        return hub.upload_folder(
            Path(folder), repo_id, private=private, branch=branch, commit_message=commit_message, token=token
        )
