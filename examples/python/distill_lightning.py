"""Distils a daemon's teacher into a CIFAR ResNet, without data, with Lightning.

dreamfeed serve --teacher teacher.safetensors --preset cifar10-live
python examples/python/distill_lightning.py --connect 127.0.0.1:7461 --arch resnet20 --steps 20000
"""

import argparse
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from dreamfeed import Batch, Client, DreamStream
from dreamfeed.lightning import PushStudent, StreamCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar_resnet


class Distillation(pl.LightningModule):
    def __init__(self, student: torch.nn.Module, steps: int, temperature: float = 4.0) -> None:
        super().__init__()
        self.student, self.steps, self.temperature = student, steps, temperature

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images, _, teacher_logits, info = batch
        t = self.temperature
        log_probabilities = F.log_softmax(self.student(images) / t, 1)
        loss = F.kl_div(log_probabilities, F.softmax(teacher_logits / t, 1), reduction="batchmean") * t * t
        self.log("loss", loss, prog_bar=True, batch_size=info.count)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connect", default="127.0.0.1:7461")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--push-every", type=int, default=200)
    parser.add_argument(
        "--resume", help="a checkpoint of Lightning's: the stream goes on with the very next image"
    )
    args = parser.parse_args()

    client = Client(args.connect)
    teacher = client.describe().teacher
    student = cifar_resnet.ResNet(args.arch, teacher.image_shape[0], teacher.num_classes)
    stream = DreamStream(args.connect, start="earliest", batch_size=args.batch_size, replay=0.5)
    trainer = pl.Trainer(
        max_steps=args.steps,
        callbacks=[
            PushStudent(client, args.arch, every_n_steps=args.push_every, student="student"),
            StreamCheckpoint(stream),
        ],
    )
    trainer.fit(Distillation(student, args.steps), DataLoader(stream, batch_size=None), ckpt_path=args.resume)


if __name__ == "__main__":
    main()
