"""Who takes part in distribution matching: a student, a critic that learns its clips, and a frozen teacher.

With LoRA all three are adapters, or none, over one set of frozen weights that is there once: three models whose base
weights are the very same tensors. So none has to be switched before a pass, nor again before its layers are
recomputed. Where weights are sharded each model has its own.
"""

import copy
from dataclasses import dataclass
from typing import Any

from accelerate.utils import set_seed

from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.results.teacher import Teacher, add_own_lora, fuse_lora, load_teacher
from causal_wan.runs.parts import (
    add_own_adapters,
    has_base_of_student,
    load_student,
    load_trained,
    save_memory,
    weight_dtype,
)
from causal_wan.runs.settings import MatchingRunConfig
from causal_wan.training.strategies import is_sharded
from causal_wan.weights.lora import add_lora, go_on_from_lora


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of a run.

    Attributes:
        student: To be trained; the run's result is made of it.
        critic: To be trained beside it; starts as the teacher, or as what is named.
        teacher: Frozen, in eval mode.
    """

    student: CausalWanTransformer3DModel
    critic: CausalWanTransformer3DModel
    teacher: CausalWanTransformer3DModel


def make_roles(config: MatchingRunConfig, teacher: Teacher, source: Teacher, accelerator: Any) -> Roles:
    """Loads the three.

    Args:
        config: Of the run.
        teacher: Of `find_matching_teacher`.
        source: What the critic starts as, of `find_critic`.
        accelerator: Of the run.

    Raises:
        ValueError: If weights or memory levers do not fit the checkpoints.
    """
    student, lora_rank = load_student(config, accelerator), config.model.lora_rank
    if lora_rank and not is_sharded(accelerator):
        base = student if has_base_of_student(source, config) else load_critic(config, source, accelerator)
        critic = share_weights(base)
        critic.set_causal_config(source.causal)
    else:
        base, critic = None, load_critic(config, source, accelerator)
    if base is not None and teacher.has_base_of(source):
        frozen = share_weights(base)
        frozen.set_causal_config(teacher.causal)
        add_own_lora(frozen, teacher)
    else:
        frozen = load_teacher(teacher, weight_dtype(accelerator), accelerator.device)
    if lora_rank:
        set_seed(config.training.seed)  # loading draws numbers, and not equally many in every strategy
        add_adapters_of_student(student, config)
        add_adapters_of_critic(critic, source, config)
    elif source.lora is not None:
        fuse_lora(critic, source.lora)
        critic.requires_grad_(True)  # a LoRA freezes what it is added to
    with_gradients = [student, critic] + ([frozen] if config.matching.adversarial_weight else [])
    for model in with_gradients:
        save_memory(model, config)
    return Roles(student=student, critic=critic, teacher=frozen.requires_grad_(False).eval())


def load_critic(config: MatchingRunConfig, source: Teacher, accelerator: Any) -> CausalWanTransformer3DModel:
    """The weights that it starts from without their LoRA, to be trained, or the base of what is trained."""
    return load_trained(
        config,
        accelerator,
        source.base,
        source.causal,
        generator_ckpt=source.generator_ckpt,
        revision=source.revision,
    )


def share_weights(transformer: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """A second model of the same tensors: what is changed in one is changed in the other, and nothing is held twice.

    Adapters that either gets later are its own.
    """
    tensors = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


def add_adapters_of_student(student: CausalWanTransformer3DModel, config: MatchingRunConfig) -> None:
    """New adapters, or those that it goes on from.

    Raises:
        ValueError: If these have another rank than the settings say.
    """
    if config.matching.student_lora is None:
        add_own_adapters(student, config.model)
        return
    lora = go_on_from_lora(student, config.matching.student_lora)
    if lora.r != config.model.lora_rank:
        raise ValueError(
            f"lora_rank must be that of student_lora, {lora.r}, got {config.model.lora_rank}; give --lora_rank "
            f"{lora.r}."
        )


def add_adapters_of_critic(critic: CausalWanTransformer3DModel, source: Teacher, config: MatchingRunConfig) -> None:
    """Those that it starts with, to be trained on, or new ones.

    Raises:
        ValueError: If they have another rank than the settings say.
    """
    rank, model = config.matching.critic_lora_rank, config.model
    if source.lora is None:
        rank = rank or model.lora_rank
        add_lora(critic, rank=rank, alpha=rank, target_modules=model.lora_target_modules)
        return
    lora = go_on_from_lora(critic, source.lora)
    if rank not in (None, lora.r):
        raise ValueError(
            f"the critic starts as a LoRA of rank {lora.r}, so critic_lora_rank must be {lora.r}, got "
            f"{rank}; leave it out."
        )
