"""The three ways to write a handler. The loop steps each of them as a `Resumable`."""
