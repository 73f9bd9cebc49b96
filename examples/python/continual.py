"""Teaches a daemon's teacher new classes: real images of the new ones, and dreams in the place of the old ones'.

    dreamfeed serve --teacher teacher.safetensors --preset cifar10-live
    python examples/python/continual.py --connect 127.0.0.1:7461 --model teacher.safetensors \\
        --new-classes dog,frog --images train --test-data test

Images come from a folder with one subfolder a class, or from a file in CIFAR binary format, where the new classes count
on from the old ones; old classes' images are only tested on. The loss is DeepInversion's (Yin et al., CVPR 2020).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dreamfeed import Client, DreamStream, StudentPusher, save_student
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar_resnet

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--connect", default="127.0.0.1:7461")
parser.add_argument("--model", type=Path, required=True, help="the daemon's teacher, a safetensors file")
parser.add_argument("--arch", help="the architecture; default: what the file says")
parser.add_argument("--new-classes", required=True, type=lambda text: text.split(","), metavar="LIST")
parser.add_argument("--images", type=Path, required=True, help="of the new classes: a folder or a CIFAR file")
parser.add_argument("--test-data", type=Path, help="of old and new classes")
parser.add_argument("--steps", type=int, default=1_000)
parser.add_argument(
    "--learning-rate",
    type=float,
    default=0.01,
    help="the higher, the better the new and the worse the old classes",
)
parser.add_argument("--batch-size", type=int, default=128, help="dreams a step")
parser.add_argument("--push-every", type=int, default=100)
parser.add_argument("--out", type=Path, default=Path("continual.safetensors"))
args = parser.parse_args()

client = Client(args.connect)
teacher = client.describe().teacher
(channels, height, width), old, new = teacher.image_shape, teacher.num_classes, len(args.new_classes)
names = [*(teacher.class_names or map(str, range(old))), *args.new_classes]
mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))


def labelled(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels u8 [N,C,H,W] and classes i64 [N] of the images of old and new classes."""
    if path.is_dir():
        files = [(file, k) for k, name in enumerate(names) for file in sorted((path / name).glob("*"))]
        images = [Image.open(file).convert("RGB" if channels == 3 else "L") for file, _ in files]
        pixels = np.array([np.asarray(image.resize((width, height))) for image in images], np.uint8)
        pixels = torch.from_numpy(pixels.reshape(-1, height, width, channels)).permute(0, 3, 1, 2)
        return pixels, torch.tensor([k for _, k in files])
    records = torch.from_numpy(np.fromfile(path, np.uint8)).view(-1, 1 + channels * height * width)
    records = records[records[:, 0] < len(names)]
    return records[:, 1:].reshape(-1, channels, height, width), records[:, 0].long()


def normalize(pixels: Tensor) -> Tensor:
    return (pixels / 255 - mean) / std


def divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), probabilities, reduction="batchmean")


pixels, classes = labelled(args.images)
pixels, classes = pixels[classes >= old], classes[classes >= old]
if not len(pixels):
    sys.exit(f"{args.images} has no image of {', '.join(args.new_classes)}: give --images of the new classes")

stream = DreamStream(args.connect, start="earliest", batch_size=args.batch_size, replay=0.5)
batches = iter(DataLoader(stream, batch_size=None))
before, _ = cifar_resnet.load(args.model, args.arch)
dreams, _, logits, _ = next(batches)
if (before(dreams).argmax(1) == logits.argmax(1)).float().mean() < 0.9:
    sys.exit(f"{args.model} is not what {args.connect} dreams from: give --model the daemon's teacher")

student = cifar_resnet.ResNet(before.arch, channels, old + new)
weights = before.state_dict()
for name, tensor in student.linear.state_dict().items():
    tensor[:old] = weights[f"linear.{name}"]
    weights[f"linear.{name}"] = tensor
student.load_state_dict(weights)
optimizer = torch.optim.SGD(student.parameters(), args.learning_rate, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
# As many of each class, or the student would favour the new ones.
count = max(1, args.batch_size * new // old)

with StudentPusher(client) as pusher:
    for step, (dreams, _, logits, _) in zip(range(1, args.steps + 1), batches, strict=False):
        chosen = torch.randint(len(pixels), (count,))
        top, left = torch.randint(9, (2,))  # shifted by up to 4 pixels: they are few, and seen often
        real = F.pad(normalize(pixels[chosen]), [4] * 4)[:, :, top : top + height, left : left + width]
        with torch.no_grad():
            seen_before = F.softmax(before(real), 1)
        # In one batch, because in use the batch norms will have one set of statistics for both.
        on_dreams, on_real = student(torch.cat([dreams, real])).split([len(dreams), count])
        loss = divergence(on_dreams, F.pad(F.softmax(logits, 1), (0, new)))
        loss = loss + F.cross_entropy(on_real, classes[chosen]) + divergence(on_real[:, :old], seen_before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % args.push_every == 0 or step == args.steps:
            pusher.push(student, step)
            print(f"step {step}  loss {loss:.3f}")
save_student(student, args.out, teacher, class_names=names)

if args.test_data is not None:
    pixels, classes = labelled(args.test_data)
    student.eval()
    with torch.no_grad():
        found = torch.cat([student(normalize(part)).argmax(1) for part in pixels.split(500)])
    for kind, chosen in (("old", classes < old), ("new", classes >= old), ("all", classes >= 0)):
        print(f"{kind} classes  {100 * (found == classes)[chosen].float().mean():.1f} %")
