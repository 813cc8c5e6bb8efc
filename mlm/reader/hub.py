"""Trained models in the form of the Hugging Face hub: saved, loaded and pushed as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin

from mlm.store.released import check_empty, find_model


class HubModel(ModelHubMixin):
    """What a model of `mlm` has from the hub: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    A subclass has `folder`, the run folder or the released model that it was loaded from, and
    `load_folder`.
    """

    folder: Path

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """A bare instance: the hub's own would copy what `__init__` is given into a config."""
        return object.__new__(cls)

    @classmethod
    def load_folder(cls, folder: Path, name: str | None = None, **how: Any) -> Self:
        """The model of a run folder or a released model."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **more: Any) -> str | None:
        """Write the model to an empty folder, in the compact form of released models.

        Args:
            more: as `huggingface_hub.ModelHubMixin.save_pretrained` takes it.

        Raises:
            UserError: the folder is not empty, or stage 2 of the model's run is not done.
        """
        check_empty(Path(save_directory))
        return super().save_pretrained(save_directory, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        from mlm.reader.export import export  # with statistics and tables, which reading needs not

        export(self.folder, save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **how: Any,
    ) -> Self:
        """The model of this name, folder or hub id (`mlm.store.released.find_model`).

        Args:
            revision: of a hub id: a branch, a tag or a commit.
            how: as `load_folder` takes it.

        Raises:
            UserError: there is none, or a file of it is damaged.
        """
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **how,
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **how: Any,
    ) -> Self:
        folder = find_model(
            model_id,
            revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls.load_folder(folder, **{"name": model_id, **how})
