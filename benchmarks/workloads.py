"""Standard meta-training steps: their arithmetic cost, and this program's model and a fixed random batch of each."""
import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import run_files  # noqa: F401  (puts the program on the path)


@dataclass(frozen=True)
class Workload:
    """Second order, batch normalisation, Adam, if `changes` do not say otherwise; the flags' names where they have one."""
    num_classes: int
    update_batch_size: int
    query_shots: int
    num_updates: int
    update_lr: float
    image_shape: tuple[int, int, int]
    num_filters: int
    max_pool: bool
    meta_batch_size: int
    iteration: int = 0      # of the steps
    changes: Mapping[str, Any] = field(default_factory=dict)  # of other fields of the ModelConfig

    def model(self, **others: Any) -> Any:
        """The maml.MAML; `others` are its further arguments."""
        from maml import MAML, ModelConfig
        config = ModelConfig(
            dim_input=int(np.prod(self.image_shape)), dim_output=self.num_classes, loss='xent',
            update_batch_size=self.update_batch_size, update_lr=self.update_lr, num_updates=self.num_updates,
            image_shape=tuple(self.image_shape), num_filters=self.num_filters, max_pool=self.max_pool,
            head='flatten' if self.max_pool else 'mean', clip=10.0 if self.max_pool else None)
        return MAML(replace(config, **self.changes), **others)

    def batch(self) -> Any:
        """A TaskBatch of noise; classes in turn."""
        from data_generator import TaskBatch
        rng = np.random.default_rng(0)

        def rows(shots):
            x = rng.random((self.meta_batch_size, shots * self.num_classes, int(np.prod(self.image_shape))), np.float32)
            labels = np.tile(np.eye(self.num_classes, dtype=np.float32), (self.meta_batch_size, shots, 1))
            return x, labels
        return TaskBatch(*rows(self.update_batch_size), *rows(self.query_shots))

    def flops(self) -> int:
        """Floating-point operations of the convolutions of one exact meta-gradient, by reverse over reverse.

        A query row needs each product forward and for two gradients, of the input and of the kernel; a support row, in every
        inner update, those three and the two gradients of each. The first layer's input has no gradient.
        """
        (side, _, channels), multiply_adds = self.image_shape, 0
        query_rows = self.num_classes * self.query_shots
        support_rows = self.num_classes * self.update_batch_size * self.num_updates
        for layer in range(4):
            out = side if self.max_pool else -(-side // 2)
            product = out * out * 9 * channels * self.num_filters
            multiply_adds += query_rows * product * (2 if layer == 0 else 3)
            multiply_adds += support_rows * product * (4 if layer == 0 else 9)
            channels, side = self.num_filters, out // 2 if self.max_pool else out
        return 2 * multiply_adds * self.meta_batch_size


WORKLOADS = {
    'omniglot5': Workload(5, 1, 1, 1, 0.4, (28, 28, 1), 64, False, 32),
    'mini1': Workload(5, 1, 15, 5, 0.01, (84, 84, 3), 32, True, 4),
    'omniglot20': Workload(20, 1, 1, 5, 0.1, (28, 28, 1), 64, False, 16),
    'cifarfs1': Workload(5, 1, 15, 5, 0.01, (32, 32, 3), 32, True, 4),
}
SINUSOID = Workload(1, 10, 10, 1, 1e-3, (1, 1, 1), 0, False, 25, changes={'image_shape': None, 'loss': 'mse', 'norm': 'None'})


def in_process(script: str, *arguments: Any, timeout: float | None = None, environment: Mapping[str, str] | None = None) -> Any:
    """What a script prints as JSON in its last line, in a process of its own; raises subprocess.SubprocessError if it fails or takes
    longer."""
    process = subprocess.run([sys.executable, script, *map(str, arguments)], check=True, capture_output=True, text=True, timeout=timeout,
                             env=environment)
    return json.loads(process.stdout.splitlines()[-1])


def processor() -> str:
    """The name of this machine's processor, or if the system does not tell, its architecture."""
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
        names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
