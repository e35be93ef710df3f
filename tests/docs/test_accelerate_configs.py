"""The files of recipes/accelerate as accelerate reads them, and what student and losses hand on to it."""

import os
import re
import shlex
import types
from pathlib import Path

import accelerate
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from tiny import digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch.distributed.fsdp import StateDictType

from nkd_hf import DistillationTrainer, DistillationTrainingArguments, NKDLoss, USKDLoss, create_student
from nkd_hf.losses import ViTKDLoss
from nkd_hf.trainer.distillation_model import DistillationModel

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
# File -> processes on this machine, machines, GPUs that a process sees.
LAUNCHED = {
    "cpu": (2, 1, None),
    "one_gpu": (1, 1, "0"),
    "eight_gpus": (8, 1, None),
    "two_machines": (8, 2, None),
    "fsdp2": (8, 1, None),
}


def launched(name: str, *arguments: str) -> tuple[types.SimpleNamespace, dict[str, str]]:
    """What `accelerate launch` makes of a file: its arguments for the launcher, and the environment of the processes."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(CONFIGS[name]), *arguments, "recipes/distill_deit.py"])
    args, *_ = _validate_launch_command(args)
    if args.multi_gpu or args.use_fsdp:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


def test_every_file_is_tested():
    assert CONFIGS.keys() == LAUNCHED.keys()


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_file_launches(name):
    processes, machines, visible = LAUNCHED[name]
    config = load_config_from_file(str(CONFIGS[name]))  # a ValueError for a key that accelerate does not know
    assert config.use_cpu == (name == "cpu")
    assert (config.num_processes, config.num_machines) == (processes * machines, machines)
    # Without a port, two machines would each look for one of their own; on one machine, two runs must not meet.
    args, environment = launched(name, *(["--main_process_ip", "10.0.0.1"] if machines > 1 else []))
    if processes > 1:
        assert args.nproc_per_node == str(processes)
        assert args.main_process_port == 29500 if machines > 1 else args.main_process_port > 1023
    if machines > 1:
        assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 0, "10.0.0.1:29500")
        second, _ = launched(name, "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
        assert second.node_rank == 1
    assert environment.get("CUDA_VISIBLE_DEVICES") == (visible or os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if name == "fsdp2" else None)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_file_says_how_it_is_launched_and_whether_it_was_run(name):
    header = [line for line in CONFIGS[name].read_text().splitlines() if line.startswith("#")]
    (launch,) = [line for line in header if line.startswith("# launch ")]
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml " in launch
    assert " recipes/distill_deit.py" in launch
    (tested,) = [line for line in header if line.startswith("# tested ")]
    assert ("untested" in tested) == (name != "cpu")


@pytest.mark.parametrize("row", sorted(path.stem for path in (ROOT / "recipes" / "configs").glob("[!d]*.yaml")))
def test_launch_line_of_a_row_starts_its_number_of_processes(row):
    header = (ROOT / "recipes" / "configs" / f"{row}.yaml").read_text()
    (line,) = re.findall(r"^# launch +accelerate launch (.*?)(?: \(on the second machine.*)?$", header, re.MULTILINE)
    (gpus,) = re.findall(r"^# batch +(\d+) GPUs", header, re.MULTILINE)
    args = launch_command_parser().parse_args(shlex.split(line))
    # The file is named as from the root of the repository.
    args.config_file = str(ROOT / args.config_file)
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == int(gpus)
    assert args.multi_gpu
    assert args.training_script_args == ["--config", f"recipes/configs/{row}.yaml"]


def test_processes_that_would_each_train_by_themselves_say_so(tmp_path, monkeypatch):
    args = DistillationTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    # As from `accelerate launch` with the CPU's file, and without --use_cpu true on a machine that has no GPU.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but world_size is 1, and each would train alone"):
        DistillationTrainer(timm_cnn(), args)


def test_keys_of_the_fsdp_file_are_options_of_accelerate():
    settings = yaml.safe_load(CONFIGS["fsdp2"].read_text())["fsdp_config"]
    options = vars(launch_command_parser().parse_args(["x.py"]))
    assert set(settings) <= set(options), accelerate.__version__


STUDENTS = {
    "timm-deit": (timm_deit, {"Block"}, 4),
    "timm-cnn": (timm_cnn, {"BasicBlock"}, 8),
    "native-vit": (native_vit, {"ViTEmbeddings", "ViTLayer"}, 5),
    "native-resnet": (native_resnet, {"ResNetShortCut", "ResNetConvLayer"}, 12),
    # Its blocks are in no list: the model is sharded as one.
    "timm-regnet": (lambda: create_student("regnetx_002", num_labels=10), set(), 0),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_fsdp2_finds_the_blocks_of_the_student(name):
    student, classes, count = STUDENTS[name]
    with patch_environment(**launched("fsdp2")[1]):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is False
    model = DistillationModel(student(), {"nkd": NKDLoss()})
    assert model._no_split_modules == classes
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert sum(policy(module) for module in model.modules()) == count


def three_losses() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10), "vitkd": ViTKDLoss(32, 48)}


CHECKPOINTED = {
    "timm-deit": (timm_deit, "attn", three_losses, lambda: timm_deit(seed=1, width=48)),
    "native-vit": (native_vit, "attention", three_losses, lambda: timm_deit(seed=1, width=48)),
    "timm-cnn": (timm_cnn, "conv1", NKDLoss, lambda: timm_cnn(seed=1)),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_of_the_student_computes_twice_and_gives_the_same_gradients(tmp_path, name):
    student, part, losses, teacher = CHECKPOINTED[name]

    def run(enable=None, **kwargs) -> tuple[int, dict[str, torch.Tensor], DistillationModel]:
        trainer = make_trainer(
            tmp_path, student(), digits(0, 32), teacher=teacher(), distillation_loss=losses(), max_steps=1, optim="sgd",
            learning_rate=0.05, **kwargs,
        )  # fmt: skip
        if enable is not None:
            getattr(trainer.model, enable)()
        calls = []
        for path, module in trainer.student.named_modules():
            # Inside of the blocks: hooks of a block itself stay outside of its checkpoint in transformers' models.
            if path.endswith(f".{part}") and path.count(".") > 1:
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        trainer.train()
        return len(calls), trainer.model.state_dict(), trainer.model

    calls, weights, _ = run()
    assert calls > 0
    for kwargs in (
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True},
        {"enable": "activation_checkpointing_enable"},
        {"enable": "gradient_checkpointing_enable"},
    ):
        more_calls, same_weights, model = run(**kwargs)
        assert more_calls == 2 * calls
        for key, value in weights.items():
            # BatchNorm sees each batch a second time.
            if "running_" not in key and "num_batches" not in key:
                torch.testing.assert_close(same_weights[key], value, rtol=0, atol=0)
        # The second pass leaves no feature in memory.
        for tap in model.taps.values():
            with pytest.raises(RuntimeError, match="took no part"):
                tap.take()


def test_student_that_cannot_be_checkpointed_says_so(tmp_path):
    trainer = make_trainer(tmp_path, native_resnet(), digits(0, 32), activation_checkpointing=True)
    with pytest.raises(ValueError, match="ResNetForImageClassification does not support activation checkpointing"):
        trainer.train()


def test_fsdp2_is_told_no_class_that_the_student_lacks():
    """accelerate stops at one. Models of transformers may name classes of their family."""
    student = native_vit()
    student._no_split_modules = [*student._no_split_modules, "ViTPooler"]
    assert DistillationModel(student, {})._no_split_modules == {"ViTEmbeddings", "ViTLayer"}
