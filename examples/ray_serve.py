"""Serves FLUX.1-dev on all GPUs of a Ray cluster: `serve run examples.ray_serve:app`, or run this file.

`jitaccel serve` does the same on one machine. docs/serving.md explains requests, limits and scaling.
"""

from jitaccel.serving.deployment import NAME, Serving, application
from jitaccel.serving.limits import Limits

app = application(
    Serving(
        model="black-forest-labs/FLUX.1-dev",
        gpus=1,  # Ray places one replica on each free GPU
        replicas=(1, 8),  # adds one while each has over `target_ongoing` requests, removes one when idle
        target_ongoing=4,
        batch=4,
        execution="auto",  # one forward for a batch; "indexed" gives the same bytes whatever the batch contains
        limits=Limits(waiting=256, seconds=120),
    )
)

if __name__ == "__main__":
    import threading

    from ray import serve

    serve.start(http_options={"host": "0.0.0.0", "port": 8000})
    serve.run(app, name=NAME, route_prefix="/")
    threading.Event().wait()
