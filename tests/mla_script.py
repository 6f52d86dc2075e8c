"""A training script as users of MLA have it: two encoders, one shared head, one modality after the other in each batch.

It knows nothing of ``igm_rs``. ``test_dropin.py`` changes two of its lines (five with SAM) and trains with both.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def get_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Alternating training of two modalities with a shared head.")
    parser.add_argument("--data", type=Path, required=True, help="npz with x_a, x_v, y, valid_x_a, valid_x_v, valid_y")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--lr-decay-step", type=int, default=7, help="epochs between two drops of the learning rate")
    parser.add_argument("--lr-decay-ratio", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--embed-dim", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", type=Path, help="file that is written after every epoch")
    parser.add_argument("--resume", type=Path, help="such a file, to go on from")
    return parser.parse_args(argv)


class Encoder(nn.Module):
    def __init__(self, inputs, embed_dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, embed_dim), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


class Classifier(nn.Module):
    def __init__(self, inputs_a, inputs_v, classes, embed_dim):
        super().__init__()
        self.net_a = Encoder(inputs_a, embed_dim)
        self.net_v = Encoder(inputs_v, embed_dim)
        self.fc_out = nn.Linear(embed_dim, classes)

    def forward(self, x_a, x_v):
        return self.fc_out(self.net_a(x_a)), self.fc_out(self.net_v(x_v))


def load_data(args):
    with np.load(args.data) as archive:
        train, valid = (
            TensorDataset(*(torch.from_numpy(archive[part + key]) for key in ("x_a", "x_v", "y")))
            for part in ("", "valid_")
        )
    shuffle = torch.Generator()
    return DataLoader(train, args.batch_size, shuffle=True, generator=shuffle), DataLoader(valid, args.batch_size)


def build_model(args, loader):
    x_a, x_v, y = loader.dataset.tensors
    torch.manual_seed(args.seed)
    return Classifier(x_a.shape[1], x_v.shape[1], int(y.max()) + 1, args.embed_dim).to(x_a.dtype)


def train_epoch(args, epoch, model, loader, optimizer, scheduler):
    criterion = nn.CrossEntropyLoss()
    loader.generator.manual_seed(1000 * args.seed + epoch)
    model.train()
    total_a = total_v = 0.0

    for x_a, x_v, label in loader:
        loss_a = criterion(model.fc_out(model.net_a(x_a)), label)
        loss_a.backward()
        optimizer.step()
        optimizer.zero_grad()

        loss_v = criterion(model.fc_out(model.net_v(x_v)), label)
        loss_v.backward()
        optimizer.step()
        optimizer.zero_grad()

        total_a += loss_a.item()
        total_v += loss_v.item()

    scheduler.step()
    return total_a / len(loader), total_v / len(loader)


def entropy_weights(out_a, out_v):
    """Weight of each modality for each sample: the surer one, by the entropy of its prediction, counts more."""
    probabilities = torch.stack([out_a.softmax(1), out_v.softmax(1)])
    entropy = -(probabilities * probabilities.log()).sum(2)
    weights = torch.exp(entropy.max(0).values - entropy)
    return weights / weights.sum(0), probabilities


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    right = torch.zeros(3)
    for x_a, x_v, label in loader:
        out_a, out_v = model(x_a, x_v)
        weights, probabilities = entropy_weights(out_a, out_v)
        fused = (weights[:, :, None] * probabilities).sum(0)
        for i, prediction in enumerate((out_a, out_v, fused)):
            right[i] += (prediction.argmax(1) == label).sum()
    acc_a, acc_v, acc = (right / len(loader.dataset)).tolist()
    return acc_a, acc_v, acc


def main(argv=None):
    args = get_arguments(argv)
    train_loader, valid_loader = load_data(args)
    model = build_model(args, train_loader)

    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_decay_step, args.lr_decay_ratio)

    first_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.resume, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first_epoch = checkpoint["epoch"] + 1

    history = []
    for epoch in range(first_epoch, args.epochs):
        lr = optimizer.param_groups[0]["lr"]
        loss_a, loss_v = train_epoch(args, epoch, model, train_loader, optimizer, scheduler)
        acc_a, acc_v, acc = evaluate(model, valid_loader)
        history.append({"epoch": epoch, "lr": lr, "loss_a": loss_a, "loss_v": loss_v, "acc": (acc_a, acc_v, acc)})
        print(f"epoch {epoch}: lr {lr:g}, loss {loss_a:.3f} {loss_v:.3f}, accuracy {acc_a:.3f} {acc_v:.3f} {acc:.3f}")
        if args.ckpt:
            checkpoint = {
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "acc": acc,
            }
            torch.save(checkpoint, args.ckpt)

    return model, optimizer, history


if __name__ == "__main__":
    main()
