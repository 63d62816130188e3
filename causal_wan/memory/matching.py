"""The memory of a run in which a student draws clips, and a critic and a teacher look at them.

Three models, of which one is frozen; with LoRA on one GPU they have their frozen weights in common. A step consists of
rollouts, a turn of the student beside passes of the two others, and a turn of the critic.
"""

from dataclasses import replace

from causal_wan.memory.plan import MemoryPlan, deepen, parameter_sizes, plan_training
from causal_wan.memory.simulation import (
    ValidationWorkload,
    Workload,
    simulate_measuring,
    simulate_passes,
    simulate_sampling,
)


def plan_matching(
    student: Workload,
    critic: Workload,
    teacher: Workload,
    *,
    num_draws: int,
    critic_shares_base: bool,
    teacher_shares_base: bool,
    looks_inside: bool = False,
) -> MemoryPlan:
    """The memory of steps and of validation, without VAE and text encoder.

    Args:
        student: With the clean context of its one pass with gradients.
        critic: Likewise, without.
        teacher: As if all of it were trained, on one GPU.
        num_draws: M, of the noise of a rollout.
        critic_shares_base: Whether the critic's frozen weights are those of the student.
        teacher_shares_base: Whether the teacher's are those of the critic.
        looks_inside: Whether a discriminator looks at what the teacher makes of clips, whose gradients go through it.
    """
    plan, of_critic = plan_training(student), plan_training(critic)
    scorers = [critic] if teacher.architecture == critic.architecture else [critic, teacher]
    scoring = max(deepen(_of_clips(scorer, num_draws), simulate_measuring)[0] for scorer in scorers)
    cache, sampling = deepen(_of_clips(student, num_draws), simulate_sampling)
    looking = deepen(replace(teacher, lora_rank=1), simulate_passes)[0] if looks_inside else 0
    weights = plan.weights + of_critic.weights
    if not teacher_shares_base:  # whole, on each GPU
        weights += parameter_sizes(teacher).trainable * teacher.dtype.itemsize
    if critic_shares_base:
        weights -= parameter_sizes(critic).frozen_bytes
    return replace(
        plan,
        weights=weights,
        optimizer=plan.optimizer + of_critic.optimizer,
        passes=max(plan.passes + max(student.batch_size * scoring, looking), of_critic.passes),
        rollout=student.batch_size * sampling,
        rollout_cache=student.batch_size * cache,
    )


def _of_clips(workload: Workload, num_draws: int) -> Workload:
    """The same with clips of the run in the place of those of its validation."""
    return replace(workload, validation=ValidationWorkload(latent_shape=workload.latent_shape, num_draws=num_draws))
