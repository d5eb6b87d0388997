"""Devices: what a CPU cannot compute is found before the work begins."""

import subprocess
import sys

from helpers import ROOT

CODE = """
import torch
from cnn_lstm import CNNLSTM
from modeling.inference import prepare_for_inference
from utils.device import prepare_model
from utils.errors import UserError

for prepare in (prepare_model, prepare_for_inference):
    torch.manual_seed(0)
    model = CNNLSTM(2, lstm_hidden=4)
    drawn = torch.get_rng_state()
    prepare(model, torch.device("cpu"), torch.float32)
    try:
        prepare(model, torch.device("cpu"), torch.bfloat16)
        print("no error")
    except UserError as error:
        print(error)
    assert torch.equal(drawn, torch.get_rng_state())
"""


def test_an_lstm_in_bf16_on_a_cpu_without_avx512_is_refused() -> None:
    """oneDNN obeys the environment variable, so that any CPU can play an older one."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = "this CPU cannot run the model's LSTM in bfloat16: give --precision fp32\n"
    assert done.stdout == 2 * line
