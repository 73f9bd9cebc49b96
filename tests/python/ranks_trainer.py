"""One process of a distributed training, for test_ranks.py, started by torchrun: prints the sequences it was given.

python ranks_trainer.py KIND ADDRESS STEPS BATCH_SIZE
"""

import sys
from itertools import islice

import torch
from dreamfeed import Batch, DreamStream
from torch.utils.data import DataLoader

KIND, ADDRESS, STEPS, BATCH_SIZE = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def tell(sequences: list[int]) -> None:
    # One write: both processes share the pipe.
    sys.stdout.write(f"sequences {' '.join(map(str, sequences))}\n")
    sys.stdout.flush()


def bare(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What people do where a loader takes only tensors."""
    return batch.images, batch.info.sequence


def main() -> None:
    torch.set_num_threads(1)
    stream = DreamStream(ADDRESS, start="earliest", batch_size=BATCH_SIZE)
    if KIND == "lightning":
        import lightning.pytorch as lightning
        from lightning_module import Seeing

        module = Seeing()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=1,
            limit_train_batches=STEPS,  # with max_steps it would fetch one more, which the log does not have
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(module, DataLoader(stream, batch_size=None))
        tell(module.seen)
        return
    if KIND == "late":
        # A launcher that tells nothing by the environment; the process group comes after the iteration.
        import os

        rank, ranks = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
        batches = iter(DataLoader(stream, batch_size=None))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
        tell([sequence for batch in islice(batches, STEPS) for sequence in batch.info.sequence.tolist()])
        return
    if KIND == "plain":
        torch.distributed.init_process_group("gloo")
        batches = DataLoader(stream, batch_size=None, num_workers=1)
        tell([sequence for batch in islice(batches, STEPS) for sequence in batch.info.sequence.tolist()])
        torch.distributed.destroy_process_group()
        return
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    configuration = DataLoaderConfiguration(dispatch_batches=KIND != "accelerate-shards")
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = DataLoader(stream, batch_size=None, collate_fn=bare)
    if KIND != "accelerate":
        loader = accelerator.prepare(loader)
    tell([sequence for _, sequences in islice(loader, STEPS) for sequence in sequences.tolist()])
    accelerator.end_training()


if __name__ == "__main__":
    main()
