import logging.config

listener = logging.config.listen(0)
listener.start()
listener.ready.wait()
print(f"port {listener.port}", flush=True)
listener.join()
