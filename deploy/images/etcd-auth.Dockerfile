# Turns on the authentication of an etcd cluster. Build from the root of the checkout.

FROM quay.io/coreos/etcd:v3.6.16 AS etcd

FROM debian:bookworm-slim
COPY --from=etcd /usr/local/bin/etcdctl /usr/local/bin/
COPY deploy/images/etcd-auth.sh /usr/local/bin/
USER nobody
CMD ["/usr/local/bin/etcd-auth.sh"]
