"""Uploads the result of a run, or a whole pipeline, to the hub, with a model card.

    python push_to_hub.py --checkpoint outputs/my-wan --hub_model_id me/my-wan

It is what `--push_to_hub` does at the end of a run, and finishes an upload that failed: files that are there already
are not sent again. The token is that of `hf auth login`, or HF_TOKEN's.
"""

import sys
from pathlib import Path

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import checked_dataclass
from causal_wan.config.settings import HubConfig


@checked_dataclass
class Config:
    """What goes where."""

    checkpoint: LocalPath
    """Output folder of a finished run, or a folder of `convert_checkpoint.py --to pipeline`."""
    hub_model_id: str
    """Name of the repository, USER/NAME."""
    hub_private_repo: bool = False
    """Make a new repository private."""


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__)

from causal_wan.records.checkpoints import check_is_no_checkpoint
from causal_wan.results.model_card import describe
from causal_wan.results.uploads import open_repository, upload_result
from causal_wan.weights.lora import LORA_WEIGHTS_NAME
from causal_wan.weights.wan_names import check_weights_in


@user_errors(OSError)
def main(config: Config) -> None:
    """Uploads; the exit status is 1 if it could not."""
    with user_errors():
        if not Path(config.checkpoint).is_dir():
            raise ValueError(f"checkpoint must be a folder, got {config.checkpoint}.")
        if not any(Path(config.checkpoint, name).exists() for name in ("transformer", LORA_WEIGHTS_NAME)):
            check_is_no_checkpoint("checkpoint", config.checkpoint)
            raise ValueError(
                f"checkpoint must be the result of a run (transformer/ or {LORA_WEIGHTS_NAME}), got "
                f"{config.checkpoint}, which has neither."
            )
        if Path(config.checkpoint, "transformer").is_dir():  # half of one is no use to anybody
            check_weights_in(Path(config.checkpoint, "transformer"), config=True)
        hub = HubConfig(push_to_hub=True, hub_model_id=config.hub_model_id, hub_private_repo=config.hub_private_repo)
        repo_id = open_repository(hub, config.checkpoint)
        try:
            print(f"uploaded: {upload_result(config.checkpoint, hub, repo_id)}")
        except ValueError:
            raise
        except Exception as error:
            print(f"the upload failed: {describe(error)}\nrun the same command again.", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main(config)
