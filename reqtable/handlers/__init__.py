"""The three ways to write a handler: blocking, state machine, coroutine. The loop steps each as a `Resumable`."""
