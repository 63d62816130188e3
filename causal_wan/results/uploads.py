"""A run's result on its way to the hub, in the background while it trains and at the end.

An upload never costs the run anything: what fails is tried again, then reported with the command that finishes it.
What goes up is listed here, by name: never data, caches, prompts of the data set, trackers' logs or local paths.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import tqdm as HubBar
from tqdm.auto import tqdm

from causal_wan.config.changed_settings import SETTINGS_NAME
from causal_wan.config.parsing import write_recipe
from causal_wan.config.settings import HubConfig
from causal_wan.model.control import PATCH_EMBEDDING_NAME
from causal_wan.records.checkpoints import check_is_no_checkpoint
from causal_wan.records.metrics import METRICS_NAME
from causal_wan.results.export import PIPELINE_NAME
from causal_wan.results.model_card import DATA_SUMMARY_NAME, copy_samples, describe, make_card
from causal_wan.results.run_record import RunRecord
from causal_wan.weights.lora import LORA_WEIGHTS_NAME


logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "last-checkpoint"
# What of an output folder goes up as it is. Of a whole pipeline, all its parts.
RESULT = ("transformer/*", LORA_WEIGHTS_NAME, PATCH_EMBEDDING_NAME, PIPELINE_NAME, METRICS_NAME, DATA_SUMMARY_NAME)
PIPELINE = ("model_index.json", "scheduler/*", "text_encoder/*", "tokenizer/*", "vae/*")
WAITS = (5, 30)  # seconds before the second and the third attempt

# The hub's bars are in one list with all others, but have a lock of their own: a line that the run writes beside its
# bar while they come and go in a thread would end the run ("Set changed size during iteration").
HubBar.set_lock(tqdm.get_lock())


# --- uploads ---------------------------------------------------------------------------------------------------------


def start_uploads(config: HubConfig, output_dir: str | Path) -> "HubUploads | None":
    """The uploads of a run, if there are to be any.

    Raises:
        ValueError: As `open_repository`.
    """
    return HubUploads(config, output_dir, open_repository(config, output_dir)) if config.push_to_hub else None


def open_repository(config: HubConfig, output_dir: str | Path) -> str:
    """Makes the repository unless it is there, and returns its full name.

    A hub that cannot be reached is reported and no error: it may be there at the end.

    Raises:
        ValueError: If nobody is logged in, or may not write there.
    """
    name = config.hub_model_id or Path(output_dir).resolve().name
    if get_token() is None:
        raise ValueError("push_to_hub needs a token that may write; run `hf auth login`, or set HF_TOKEN.")
    try:
        return HfApi().create_repo(name, private=config.hub_private_repo or None, exist_ok=True).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code in (400, 401, 403, 404):
            raise ValueError(
                f"the token must be allowed to write to {name} on the hub, which said: {error}. Run `hf auth login` "
                "with another token, or choose another --hub_model_id."
            ) from None
        reason = str(error)
    except (HTTPError, OSError, OfflineModeIsEnabled) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("the hub cannot be reached now (%s); the upload will be tried at the end.", reason)
    return name


class HubUploads:
    """The uploads of a run, one after the other, in the background.

    Args:
        config: Says whether and where.
        output_dir: Of the run.
        repo_id: From `open_repository`.
    """

    def __init__(self, config: HubConfig, output_dir: str | Path, repo_id: str) -> None:
        self.config, self.output_dir, self.repo_id = config, Path(output_dir), repo_id
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hub")
        self._checkpoint: Future | None = None

    def upload_checkpoint(self, checkpoint: Path) -> None:
        """Uploads a checkpoint while the run goes on; leaves it out if an earlier one is still on its way."""
        if self.config.hub_strategy != "every_save" or not checkpoint.is_dir():
            return
        if self._checkpoint is not None and not self._checkpoint.done():
            logger.warning("%s does not go to the hub: an earlier one is still on its way.", checkpoint.name)
            return
        try:
            staged = Path(tempfile.mkdtemp(prefix="uploading-", dir=self.output_dir))
            link_tree(checkpoint, staged / "files")  # the checkpoint may be rotated away meanwhile
            (staged / "files" / SETTINGS_NAME).unlink(missing_ok=True)  # it has paths of this machine
        except OSError as error:  # a full disk costs no run its life
            logger.error("%s does not go to the hub: %s", checkpoint.name, describe(error))
            return
        self._checkpoint = self._worker.submit(self._upload_checkpoint, staged, checkpoint.name)

    def _upload_checkpoint(self, staged: Path, name: str) -> None:
        settings = {"path_in_repo": CHECKPOINT_FOLDER, "delete_patterns": "*", "commit_message": f"Upload {name}"}
        try:
            try_to(lambda: HfApi().upload_folder(repo_id=self.repo_id, folder_path=staged / "files", **settings))
        except Exception as error:  # the run goes on whatever it is
            logger.error("%s could not be uploaded to %s: %s", name, self.repo_id, describe(error))
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def finish(self) -> bool:
        """Uploads the result after what is on its way; returns whether that went well, and says what to do if not."""
        done = self._worker.submit(upload_result, self.output_dir, self.config, self.repo_id)
        self._worker.shutdown()
        try:
            print(f"uploaded: {done.result()}")
            return True
        except Exception as error:
            logger.error(
                "the result could not be uploaded: %s\nIt is whole in %s. To finish:\n    %s",
                describe(error),
                self.output_dir,
                finishing_command(self.output_dir, self.repo_id, private=self.config.hub_private_repo),
            )
            return False


def finishing_command(output_dir: Path, repo_id: str, *, private: bool) -> str:
    """The command that uploads a result which is in its folder."""
    command = f"python push_to_hub.py --checkpoint {output_dir} --hub_model_id {repo_id}"
    return command + " --hub_private_repo" * private


def upload_result(output_dir: str | Path, config: HubConfig, repo_id: str) -> str:
    """Uploads a result with its card, and returns its address; files that are there already are not sent again.

    Raises:
        Exception: Whatever huggingface_hub raises, after the last attempt.
    """
    folder, api = Path(output_dir), HfApi()
    with stage_result(folder, repo_id) as staged:

        def upload() -> str:
            name = api.create_repo(repo_id, private=config.hub_private_repo or None, exist_ok=True).repo_id
            api.upload_folder(repo_id=name, folder_path=staged, commit_message="Upload the result of training")
            return f"{api.endpoint}/{name}"

        return try_to(upload)


def try_to(action: Callable[[], Any]) -> Any:
    """What an action returns, at the third attempt at the latest.

    Raises:
        Exception: That of the last attempt, or of the first that another will not help.
    """
    for wait in WAITS:
        try:
            return action()
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code not in (408, 429):
                raise
            reason = describe(error)
        except (HTTPError, OSError, RuntimeError) as error:
            reason = describe(error)
        logger.warning("an upload failed (%s); trying again in %d s", reason, wait)
        time.sleep(wait)
    return action()


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder that takes no room where the disk knows hard links."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link)


# --- what goes up ----------------------------------------------------------------------------------------------------


@contextmanager
def stage_result(folder: Path, repo_id: str) -> Iterator[Path]:
    """A folder of what goes up, for a while.

    Raises:
        ValueError: If there is no result in the folder.
    """
    is_pipeline = (folder / "model_index.json").is_file()
    patterns = (*RESULT, *PIPELINE) if is_pipeline else RESULT
    if not (folder / "transformer").is_dir() and not (folder / LORA_WEIGHTS_NAME).is_file():
        check_is_no_checkpoint("checkpoint", folder)
        raise ValueError(
            f"checkpoint must be the output folder of a finished run, or a whole pipeline, got {folder}, which has "
            f"neither transformer/ nor {LORA_WEIGHTS_NAME}."
        )
    with tempfile.TemporaryDirectory(prefix="uploading-", dir=folder) as made:
        staged = Path(made) / "files"
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            place = staged / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                link_tree(path, place)
            else:
                shutil.copy2(path, place)
        run = RunRecord.of_folder(folder)
        if run is not None:
            write_recipe(run.public_settings(), staged / SETTINGS_NAME)
        samples = copy_samples(folder, staged)
        make_card(folder, run, repo_id, samples).save(staged / "README.md")
        yield staged
