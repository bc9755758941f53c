"""Submit a job and print its text as it comes. Needs a worker: `mlx-serving worker`."""

from mlx_serving import Client

with Client() as client:  # MLX_SERVING_REDIS_URL, else redis://localhost:6379/0
    messages = [{"role": "user", "content": "count from 3 to 12"}]
    job = client.submit(model="tally", messages=messages, temperature=0.0)
    for text in job.text():
        print(text, end="", flush=True)
    print()
