# The collector of deploy/collector/manifest.yaml. Build from the root of the checkout:
#   docker build -f deploy/images/collector.Dockerfile -t gauntlet-collector .

FROM golang:1.26-bookworm AS build
RUN go install go.opentelemetry.io/collector/cmd/builder@v0.159.0
WORKDIR /src
COPY deploy/collector/manifest.yaml .
RUN CGO_ENABLED=0 builder --config manifest.yaml

FROM debian:bookworm-slim
RUN useradd --system --uid 10001 gauntlet
COPY --from=build /src/_build/gauntlet-collector /usr/local/bin/
COPY otel-collector.yaml /etc/gauntlet/otel-collector.yaml
USER gauntlet
EXPOSE 4317 4318 8888 8889 13133
ENTRYPOINT ["gauntlet-collector"]
CMD ["--config", "/etc/gauntlet/otel-collector.yaml"]
