"""sentence-transformers' OpenVINO backend, in an environment of its own: its extra excludes the transformers used here.

Run by benchmarks/predict_speed.py with that environment's Python: reads one JSON object a line, answers one a line.
{"model": folder, "precision": "f32" or null for its default, "texts": [[query, document], ...]} loads and warms up;
{"predict": texts} and {"rank": [query, documents]} answer {"seconds": ..., "scores": [...]}.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong between the answers
    from sentence_transformers import CrossEncoder

    model = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "model" in asked:
            hint = {"INFERENCE_PRECISION_HINT": asked["precision"]} if asked["precision"] else {}
            model = CrossEncoder(
                asked["model"], backend="openvino", device="cpu", model_kwargs={"ov_config": hint} if hint else {}
            )
            model.predict(asked["texts"], show_progress_bar=False)
            answer = {"ready": True}
        else:
            started = time.perf_counter()
            if "predict" in asked:
                scores = model.predict(asked["predict"], batch_size=32, show_progress_bar=False).tolist()
            else:
                scores = [row["score"] for row in model.rank(*asked["rank"], show_progress_bar=False)]
            answer = {"seconds": time.perf_counter() - started, "scores": scores}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
