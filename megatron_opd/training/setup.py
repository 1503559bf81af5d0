"""Builds everything that a run needs, from the config alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opd.compat.cpu_platform import apply_cpu_platform, use_cpu
from megatron_opd.config import DEFAULT_TEACHER, Config, ConfigError, TeacherConfig, TrainConfig
from megatron_opd.kernels import kernel_backend, set_kernels
from megatron_opd.models.build import build_model, check_layout
from megatron_opd.models.fp8 import fuse_gradient_accumulation
from megatron_opd.models.model import Model
from megatron_opd.models.specs import refuse_foreign_apex
from megatron_opd.parallel.groups import Layout, student_layout, teacher_layout


@dataclass
class Trainer:
    """The student with what trains it, and the teachers."""

    student: Model
    teachers: dict[str, Model]  # by name; `teacher`'s is the first
    ddp: list[DistributedDataParallel]  # the student's chunks, wrapped
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    reference: Model | None = None  # that loss.reward_scale counts from

    @property
    def teacher(self) -> Model:
        """The one that judges where no other does."""
        return self.teachers[DEFAULT_TEACHER]

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]


def init_distributed(config: Config) -> torch.device:
    """Joins the process group that torchrun or srun started; a lone process makes its own of one."""
    try:
        refuse_foreign_apex()
        cpu = use_cpu(config.device)
        if cpu:
            apply_cpu_platform()
            device = torch.device("cpu")
        else:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        set_kernels(config.loss.kernels)
        kernel_backend(device)
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    if not cpu:
        torch.cuda.set_device(device)  # its failure is the machine's, not the config's
    if not dist.is_initialized():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        dist.init_process_group(
            "gloo" if cpu else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=config.train.watchdog_s)
        )
    torch.manual_seed(config.train.seed)
    return device


def build_trainer(config: Config, device: torch.device) -> Trainer:
    """Both models in their layouts, and the student's optimizer. Collective."""
    check_layout("student", config.student)
    for name, settings in config.teacher_by_name.items():
        check_layout(teacher_key(name), settings)
    layouts = student_layout(config.student.parallel), teacher_layout(config.teacher.parallel)
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(config.train.seed)
    student = build_model("student", config.student, layouts[0], device)
    teachers, known = {}, {config.teacher.parallel.model_dump_json(): layouts[1]}
    for name, settings in config.teacher_by_name.items():
        shape = settings.parallel.model_dump_json()
        if shape not in known:
            known[shape] = teacher_layout(settings.parallel)
        teachers[name] = build_teacher(teacher_key(name), settings, known[shape], device)
    ddp = wrap_ddp(student, config.train)
    optimizer = build_optimizer(student, ddp, config.train)
    reference = build_reference(config, layouts, device) if config.loss.reward_scale != 1 else None
    return Trainer(student, teachers, ddp, optimizer, build_scheduler(optimizer, config.train), reference)


def teacher_key(name: str) -> str:
    """The config's key of a teacher, which is what its model is called."""
    return name if name == DEFAULT_TEACHER else f"teachers[{name}]"


def build_teacher(key: str, settings: TeacherConfig, layout: Layout, device: torch.device) -> Model:
    """A frozen model; with `offload` in host memory until it is asked for. Collective."""
    if settings.offload and device.type == "cpu":
        raise ConfigError(f"{key}.offload: true moves parameters off a GPU, and there is none; set it to false")
    teacher = build_model(key, settings, layout, device)
    for chunk in teacher.chunks:
        chunk.requires_grad_(False)
    teacher.cache_gib = settings.cache_gib
    if settings.offload:
        teacher.offload = True
        teacher.leave_device()
    return teacher


def build_reference(config: Config, layouts: tuple[Layout, Layout], device: torch.device) -> Model:
    """The frozen model of loss.reference: the student as it started in the student's layout, or another one in the
    teacher's. With teacher.offload it is kept in host memory, too."""
    if config.loss.reference is None:
        plain = config.student.model_copy(update={"fp8": None, "fp8_params": False, "recompute": "none"})
        reference = build_model("reference", plain, layouts[0], device)
    else:
        other = config.teacher.model_copy(update={"model": config.loss.reference})
        reference = build_model("reference", other, layouts[1], device)
    for chunk in reference.chunks:
        chunk.requires_grad_(False)
    if config.teacher.offload:
        reference.offload = True
        reference.leave_device()
    return reference


def wrap_ddp(student: Model, train: TrainConfig) -> list[DistributedDataParallel]:
    """Megatron-Core's DistributedDataParallel around each chunk; gradients are summed in fp32."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,  # replicas run different numbers of micro-batches
        use_distributed_optimizer=train.distributed_optimizer,
        check_for_nan_in_grad=False,  # checked once a step, where the step can be skipped
        fp8_param_gather=bool(student.config.fp8_param),
    )
    ddp = [
        DistributedDataParallel(
            student.config, settings, chunk, disable_bucketing=number > 0, pg_collection=student.layout.groups
        )
        for number, chunk in enumerate(student.chunks)
    ]
    student.config.finalize_model_grads_func = finalize_model_grads
    if student.device.type == "cuda":
        fuse_gradient_accumulation(student.chunks)
    return ddp


def build_optimizer(student: Model, ddp: list[DistributedDataParallel], train: TrainConfig) -> MegatronOptimizer:
    """Megatron-Core's AdamW with fp32 main parameters; Transformer Engine's or apex's kernel where one is installed."""
    bf16 = student.config.params_dtype == torch.bfloat16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=student.config.params_dtype,
        use_distributed_optimizer=train.distributed_optimizer,
        fp8_recipe=str(student.config.fp8_recipe) if student.config.fp8_param else None,
    )
    return get_megatron_optimizer(settings, ddp, use_gloo_process_groups=False)


def build_scheduler(optimizer: MegatronOptimizer, train: TrainConfig) -> OptimizerParamScheduler:
    """Megatron-Core's learning rate scheduler, counted in optimizer steps.

    Step k = 1, 2, ... of W warm-up steps trains at lr k / W: Megatron-Core's own warm-up from 0 would spend the first
    step's responses on nothing.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=train.lr / max(train.warmup_steps, 1),
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=max(train.warmup_steps - 1, 0),
        lr_decay_steps=train.steps,
        lr_decay_style=train.lr_schedule,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return scheduler
