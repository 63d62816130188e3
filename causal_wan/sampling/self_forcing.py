"""A student's own rollouts in training: sampled without gradients, then one step of them made again with.

A rollout to exit k samples each block in k + 1 steps, after the clean blocks that it has drawn itself. What went into
the last step, and the clean blocks, are all that is needed to make that step again for all blocks in one pass: under
teacher forcing with the rollout itself as the clip. So gradients go through attention to earlier blocks too, and the
pass is one like any of regression: it may be checkpointed, compiled and sharded.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, M = draws of noise.

Source: Self Forcing, arXiv 2506.08009, section 3.2; one pass in the place of a cache, Solaris, arXiv 2602.22208.
"""

from dataclasses import dataclass

import torch

from causal_wan.devices import to_device
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.rollout import Rollout, SamplingSchedule, roll_out


@dataclass(frozen=True, kw_only=True)
class ExitedRollout:
    """A rollout that ended at one of its steps.

    Attributes:
        latents: What it drew, clean, `(B, C, F, H, W)`, float32.
        exit_inputs: Noisy latents that went into the last step of each block, same shape.
        exit_timesteps: Their level, `(B, F)`.
    """

    latents: torch.Tensor
    exit_inputs: torch.Tensor
    exit_timesteps: torch.Tensor

    @property
    def context(self) -> dict[str, torch.Tensor]:
        """What the pass that makes the last step again is given beside its inputs, timesteps and conditions."""
        return {"context_latents": self.latents}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # layers that are compiled are so for whole clips, not for each block
def roll_out_to_exit(
    transformer: CausalWanTransformer3DModel,
    conditions: Conditions,
    noise: torch.Tensor,
    schedule: SamplingSchedule,
    exit_step: int,
) -> ExitedRollout:
    """Samples clips in the first `exit_step + 1` steps of a schedule; the last goes to clean latents.

    Args:
        transformer: The student; says what the blocks are.
        conditions: What the clips are to show.
        noise: `(M, B, C, F, H, W)`, for all steps of the schedule.
        schedule: Of the student.
        exit_step: k, from 0 on.
    """
    num_steps, kept = exit_step + 1, []
    schedule = SamplingSchedule(timesteps=schedule.timesteps[:num_steps], sampler=schedule.sampler)

    def keep(rollout: Rollout, number: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if number % num_steps == exit_step - 1:  # steps are counted over all blocks
            kept.append(latents)
        return latents

    noise = noise[: schedule.num_draws]
    blocks = list(roll_out(transformer, conditions, noise, schedule, on_step_end=keep))
    latents = torch.cat(blocks, dim=2).float()
    timesteps = to_device(schedule.timesteps[-1:], latents.device).expand(latents.shape[0], latents.shape[2])
    inputs = torch.cat(kept, dim=2) if exit_step else noise[0].float()
    return ExitedRollout(latents=latents, exit_inputs=inputs, exit_timesteps=timesteps)
