"""The three ways to write a handler. All of them end up as a `Resumable` that the loop steps."""
