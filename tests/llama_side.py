"""llama.cpp's side of ``measure_llama``: runs with another interpreter, which has llama-cpp-python and none of ours.

Every line on stdin is a measurement to make, ``{"prompt": 512, "new": 0}``; every line on stdout its seconds.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp
import numpy as np

CONTEXT, BATCH = 1024, 512  # llama.cpp's own default of 512 tokens a batch


def check(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"llama.cpp: {what} failed")


class Model:
    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        check(bool(self.model), f"loading {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        check(bool(self.context), "making a context")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, ids: list[int]) -> int:
        """Append ``ids`` and pick the likeliest next one."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        check(llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) == 0, "decoding")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab_size,))
        check(bool(np.isfinite(logits).all()), "a step (its logits are not finite)")
        return int(logits.argmax())

    def measure(self, prompt: list[int], new: int) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        started = time.perf_counter()
        token = self.feed(prompt)
        middle = time.perf_counter()
        for _ in range(new):
            token = self.feed([token])
        return {"prefill_s": middle - started, "decode_s": time.perf_counter() - middle}


def main() -> None:
    started = time.perf_counter()
    model = Model(sys.argv[1])
    print(json.dumps({"load_s": time.perf_counter() - started, "version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(model.measure(asked["prompt"], asked["new"])), flush=True)


if __name__ == "__main__":
    main()
