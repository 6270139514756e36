"""Lightning's Trainer with the subcommand `estimate`."""

from __future__ import annotations

from lightning.pytorch import Trainer

from train.estimate import DEFAULT_MFU


class EstimatingTrainer(Trainer):
    """Its method is there for its options; what it does is `TrainCLI.estimate`."""

    def estimate(
        self,
        hardware: str | None = None,
        peak_tflops: float | None = None,
        memory_gb: float | None = None,
        mfu: float = DEFAULT_MFU,
        json: bool = False,
    ) -> None:
        """Say what training will cost.

        Args:
            hardware: Device to state hours for: here (a few steps are run on this machine) or rtx3090, rtx4090, l40s,
                a100-40gb, a100-80gb, h100, h200; all of these if none is given.
            peak_tflops: Peak rate of another device at trainer.precision, in 10^12 operations a second.
            memory_gb: Its memory, in 10^9 bytes.
            mfu: Share of the peak rate that is reached.
            json: Print JSON instead of a table.
        """


__all__ = ["EstimatingTrainer"]
