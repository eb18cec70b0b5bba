# An image whose command is `reqtable`. docs/how-to/run-in-docker.md explains how it serves a program.
ARG PYTHON=3.13

FROM python:${PYTHON} AS build
ARG EXTRAS=http,metrics,top
COPY . /src
RUN python -m venv /opt/reqtable && /opt/reqtable/bin/pip install --no-cache-dir "/src[${EXTRAS}]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/reqtable /opt/reqtable
RUN install --directory --mode=0700 --owner=65534 --group=65534 /run/reqtable
ENV PATH=/opt/reqtable/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    REQTABLE_CONTROL=/run/reqtable/control.sock
WORKDIR /srv/app
USER 65534:65534
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["reqtable", "stats", "--json"]
ENTRYPOINT ["reqtable"]
CMD ["serve", "app.py:Handler", "--bind", "tcp://0.0.0.0:7000"]
