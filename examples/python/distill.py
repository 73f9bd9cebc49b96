"""Distils a daemon's teacher into a CIFAR ResNet, without data, in plain PyTorch.

    dreamfeed serve --teacher teacher.safetensors --preset cifar10-live
    python examples/python/distill.py --connect 127.0.0.1:7461 --arch resnet20 --steps 20000 --out student.safetensors

Interrupted, it goes on from its checkpoint with the very next image.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from dreamfeed import Client, DreamStream, StudentPusher
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar_resnet

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--connect", default="127.0.0.1:7461")
parser.add_argument("--arch", default="resnet20")
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--push-every", type=int, default=200)
parser.add_argument("--temperature", type=float, default=4.0)
parser.add_argument("--out", type=Path, default=Path("student.safetensors"))
args = parser.parse_args()

client = Client(args.connect)
teacher = client.describe().teacher
student = cifar_resnet.ResNet(args.arch, teacher.image_shape[0], teacher.num_classes)
optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
stream = DreamStream(args.connect, start="earliest", batch_size=args.batch_size, replay=0.5)
parts = {"student": student, "optimizer": optimizer, "schedule": schedule, "stream": stream}

checkpoint = args.out.with_suffix(".ckpt")
done = 0
if checkpoint.exists():
    saved = torch.load(checkpoint, weights_only=True)
    done = saved.pop("step")
    for name, state in saved.items():
        parts[name].load_state_dict(state)

with StudentPusher(client, args.arch) as pusher:
    batches = iter(DataLoader(stream, batch_size=None))
    for step in range(done + 1, args.steps + 1):
        images, labels, teacher_logits, info = next(batches)
        t = args.temperature
        log_probabilities = F.log_softmax(student(images) / t, 1)
        loss = F.kl_div(log_probabilities, F.softmax(teacher_logits / t, 1), reduction="batchmean") * t * t
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % args.push_every == 0 or step == args.steps:
            pusher.push(student, step)  # the next images are made where this student and the teacher disagree
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, checkpoint)
            print(
                f"step {step}  loss {loss:.3f}  image {info.sequence.max()}  student {info.current_student_version}"
            )

cifar_resnet.save(
    student,
    args.out,
    mean=teacher.mean,
    std=teacher.std,
    image_size=teacher.image_shape[1:],
    class_names=teacher.class_names,
)
