"""Trains the demo's teacher, a small ResNet, on the training split of scikit-learn's handwritten digits.

    .venv/bin/python examples/digits/train_teacher.py --out-dir out/demo

Writes OUT/teacher.safetensors (weights; architecture, normalization, geometry and class names in its metadata) and
OUT/test.bin, the 360 held-out digits in CIFAR's binary layout: for each record one label byte, then the C*H*W pixel
bytes, here 1x16x16. Files of the same recipe are kept as they are.

The digits are 1797 pictures of 8x8 pixels (Alpaydin and Kaynak 1998, UCI), enlarged bilinearly to 16x16 here.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar_resnet

# Change this name with anything below it: files with another name are made again.
RECIPE = "digits-2"
ARCH, SIZE, TEST_COUNT = "resnet8", 16, 360
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SHIFT = 15, 64, 0.1, 5e-4, 1


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels u8 [1437,1,16,16] and labels i64 [1437], and the same of the 360 held-out digits."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] * (255.0 / 16.0)  # 0..16 -> 0..255
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    pixels, labels = images.round().clamp(0, 255).to(torch.uint8), torch.from_numpy(data.target).long()
    # Stratified, so that each class has its share in both; the seed is part of the recipe.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_COUNT, stratify=data.target, random_state=0
    )
    return pixels[train], labels[train], pixels[test], labels[test]


def shift(x: Tensor, most: int) -> Tensor:
    """Each image of [N,C,H,W] moved by its own offset of up to `most` pixels, zeros (background) moved in.

    Digits are not mirrored: that would make other signs of them.
    """
    count, _, height, width = x.shape
    padded = F.pad(x, (most, most, most, most))
    rows = torch.randint(0, 2 * most + 1, (count, 1, 1)) + torch.arange(height)[None, :, None]
    columns = torch.randint(0, 2 * most + 1, (count, 1, 1)) + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def accuracy(network: torch.nn.Module, x: Tensor, labels: Tensor) -> float:
    network.eval()
    with torch.no_grad():
        return (network(x).argmax(1) == labels).float().mean().item()


def is_current(teacher: Path, test: Path) -> bool:
    """Whether both files are there and of this recipe."""
    if not teacher.exists() or not test.exists():
        return False
    try:
        _, metadata = cifar_resnet.load(teacher)
    except Exception:
        return False
    return metadata.get("recipe") == RECIPE and test.stat().st_size == TEST_COUNT * (1 + SIZE * SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=Path("out/demo"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="train even where the files are there")
    args = parser.parse_args()
    teacher_file, test_file = args.out_dir / "teacher.safetensors", args.out_dir / "test.bin"
    if not args.force and is_current(teacher_file, test_file):
        print(f"teacher: {teacher_file} is there and current", flush=True)
        return

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    begin = time.monotonic()
    train_pixels, train_labels, test_pixels, test_labels = digits()
    mean, std = train_pixels.float().mean().item() / 255.0, train_pixels.float().std().item() / 255.0
    print(f"teacher: training {ARCH} on {len(train_labels)} digits, {EPOCHS} epochs", flush=True)
    network = cifar_resnet.ResNet(ARCH, channels=1)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = EPOCHS * (len(train_labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.2)
    test_x = (test_pixels.float() / 255.0 - mean) / std
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        order = torch.randperm(len(train_labels))[: len(train_labels) // BATCH * BATCH].view(-1, BATCH)
        for index in order:
            x = (shift(train_pixels[index].float(), SHIFT) / 255.0 - mean) / std
            loss = F.cross_entropy(network(x), train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 5 == 0 or epoch + 1 == EPOCHS:
            held_out = accuracy(network, test_x, test_labels)
            seconds = time.monotonic() - begin
            print(
                f"teacher: epoch {epoch + 1:3}/{EPOCHS}  loss {total / len(order):.4f}  "
                f"held-out digits {100 * held_out:5.1f} %  {seconds:4.1f} s",
                flush=True,
            )
    cifar_resnet.save(
        network,
        teacher_file,
        mean=[mean],
        std=[std],
        image_size=(SIZE, SIZE),
        class_names=[str(digit) for digit in range(10)],
        more={"recipe": RECIPE},
    )
    records = np.concatenate(
        [test_labels.numpy().astype(np.uint8)[:, None], test_pixels.flatten(1).numpy()], axis=1
    )
    test_file.write_bytes(records.tobytes())
    print(f"teacher: wrote {teacher_file} and {test_file}", flush=True)


if __name__ == "__main__":
    main()
