"""Distils a daemon's teacher into a CIFAR ResNet without data; started again, it goes on with the very next image.

dreamfeed serve --teacher teacher.safetensors --preset cifar10-live
python examples/python/distill.py --connect 127.0.0.1:7461 --arch resnet20 --steps 20000 --out student.safetensors
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from dreamfeed import Client, DreamStream, StudentPusher, TrainingCheckpoint, save_student
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
checkpoint = TrainingCheckpoint(args.out.with_suffix(".ckpt"), **parts)
steps, batches = range(checkpoint.load() + 1, args.steps + 1), DataLoader(stream, batch_size=None)

with StudentPusher(client) as pusher:
    for step, (images, _, teacher_logits, info) in zip(steps, batches, strict=False):
        found = F.log_softmax(student(images) / args.temperature, 1)
        wanted = F.softmax(teacher_logits / args.temperature, 1)
        loss = F.kl_div(found, wanted, reduction="batchmean") * args.temperature**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % args.push_every == 0 or step == args.steps:
            pusher.push(student, step)  # the next images are made where this student and the teacher disagree
            checkpoint.save(step)
            print(f"step {step}  loss {loss:.3f}  image {info.sequence.max()}")
save_student(student, args.out, teacher)
