"""A training script that imports and calls timm as timm's train.py does, and writes down which samples it saw.

Image i of its data is grey throughout, of value 4 i of 255, so that pixels tell who they are.
"""

import argparse
import json
import os
from datetime import datetime

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, resume_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.parallel import DistributedDataParallel

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="", type=str)
parser = argparse.ArgumentParser(description="as timm's train.py")
parser.add_argument("--data-dir")
parser.add_argument("--dataset", default="")
parser.add_argument("--train-split", default="train")
parser.add_argument("--val-split", default="validation")
parser.add_argument("--class-map", default="")
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--num-classes", type=int, default=3)
parser.add_argument("--input-size", nargs=3, type=int, default=[3, 16, 16])
parser.add_argument("--resume", default="")
parser.add_argument("-b", "--batch-size", type=int, default=4)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--weight-decay", type=float, default=0.0)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--start-epoch", type=int, default=None)
parser.add_argument("--aug-repeats", type=float, default=0)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("-j", "--workers", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--output", default="")
parser.add_argument("--experiment", default="")
parser.add_argument("--use-multi-epochs-loader", action="store_true")
parser.add_argument("--sizes", nargs="+", type=int, default=None, help="of inputs, by timm's scheduled sampler")
parser.add_argument("--release", choices=("1.0.9", "1.0.31"), default="1.0.31", help="whose way of telling the epoch")
parser.add_argument("--record", help="folder for what was seen")


def main():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(remaining)
    args_text = yaml.safe_dump(args.__dict__, default_flow_style=False)

    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, pretrained=False, num_classes=args.num_classes)
    data_config = resolve_data_config(vars(args), model=model, verbose=False)
    model.to(device=device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    resume_epoch = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else None
    if args.distributed:
        model = DistributedDataParallel(model)

    dataset_train = create_dataset(
        args.dataset, root=args.data_dir, split=args.train_split, is_training=True, class_map=args.class_map
    )
    dataset_eval = create_dataset(
        args.dataset, root=args.data_dir, split=args.val_split, is_training=False, class_map=args.class_map
    )
    pixels = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    sizes = {} if args.sizes is None else {"input_size_choices": args.sizes}
    loader_train = create_loader(
        dataset_train,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        color_jitter=0.0,
        num_aug_repeats=args.aug_repeats,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        distributed=args.distributed,
        device=device,
        use_prefetcher=args.prefetcher,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **pixels,
        **sizes,
    )
    loader_eval = create_loader(
        dataset_eval,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=False,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        distributed=args.distributed,
        device=device,
        use_prefetcher=args.prefetcher,
        **pixels,
    )

    saver = output_dir = None
    if utils.is_primary(args):
        if args.experiment:
            exp_name = args.experiment
        else:
            exp_name = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{data_config['input_size'][-1]}"
        output_dir = utils.get_outdir(args.output if args.output else "./output/train", exp_name)
        saver = utils.CheckpointSaver(
            model=model, optimizer=optimizer, args=args, checkpoint_dir=output_dir, recovery_dir=output_dir
        )
        with open(os.path.join(output_dir, "args.yaml"), "w") as file:
            file.write(args_text)

    updates_per_epoch = len(loader_train)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    record = {"updates_per_epoch": updates_per_epoch, "epochs": {}}
    for epoch in range(start_epoch, num_epochs):
        tell_epoch(args, dataset_train, loader_train, epoch)
        seen, rates = train_one_epoch(epoch, model, loader_train, optimizer, lr_scheduler, device)
        evaluated = validate(model, loader_eval, device)
        record["epochs"][epoch] = {"seen": seen, "rates": rates, "evaluated": evaluated, "length": len(loader_train)}
        if saver is not None:
            saver.save_checkpoint(epoch, metric=0.0)
        lr_scheduler.step(epoch + 1, 0.0)
    record["weights"] = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
    with open(os.path.join(args.record, f"{args.rank}.json"), "w") as file:
        json.dump(record, file)
    if args.distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def tell_epoch(args, dataset, loader, epoch):
    """As `_set_loader_epoch` of the release, or as what stood in its place."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        if args.release == "1.0.9":
            return
    elif args.release == "1.0.9" and not args.distributed:
        return
    if hasattr(loader.batch_sampler, "set_epoch"):
        loader.batch_sampler.set_epoch(epoch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def train_one_epoch(epoch, model, loader, optimizer, lr_scheduler, device):
    model.train()
    seen, rates = [], []
    num_updates = epoch * len(loader)
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        seen += numbers(images)
        rates.append(optimizer.param_groups[0]["lr"])
        loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        num_updates += 1
        lr_scheduler.step_update(num_updates=num_updates, metric=loss.item())
    return seen, rates


@torch.no_grad()
def validate(model, loader, device):
    model.eval()
    evaluated = []
    for images, _ in loader:
        model(images.to(device))
        evaluated += numbers(images)
    return evaluated


def numbers(images):
    """Which images these are, by their grey value."""
    return (images.float().mean(dim=(1, 2, 3)) * 255 / 4).round().int().tolist()


if __name__ == "__main__":
    main()
