//! gRPC with reflection and health, gRPC-web and REST share one port and the same state.

use std::time::Duration;

use gauntlet_api::v1::instance::{CreateInstanceRequest, Instance, QueryInstanceRequest, RetrieveInstanceRequest};
use prost::Message as _;
use serde_json::json;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::harness::{Backend, Manager, World, eventually, local};

const SERVICES: [&str; 3] =
    ["api.v1.challenge.ChallengeStore", "api.v1.instance.InstanceManager", "gauntlet.v1.Sweeper"];

async fn reflect(manager: &Manager, request: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let mut client = ServerReflectionClient::new(manager.channel().await);
    let responses = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    responses.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
}

#[test]
fn reflection_lists_the_services() {
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    world.runtime.block_on(async {
        let MessageResponse::ListServicesResponse(list) =
            reflect(&manager, MessageRequest::ListServices(String::new())).await
        else {
            panic!("the response lists no services")
        };
        let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        for service in SERVICES.into_iter().chain(["grpc.health.v1.Health"]) {
            assert!(names.iter().any(|name| name == service), "{service} is not among {names:?}");
        }
        // A client without the proto files, such as grpcurl, can call the service with these descriptors.
        let symbol = MessageRequest::FileContainingSymbol("api.v1.instance.InstanceManager".into());
        let MessageResponse::FileDescriptorResponse(files) = reflect(&manager, symbol).await else {
            panic!("the response has no file descriptors")
        };
        let files: Vec<_> = files
            .file_descriptor_proto
            .iter()
            .map(|file| prost_types::FileDescriptorProto::decode(file.as_slice()).unwrap())
            .collect();
        let methods = files.iter().flat_map(|file| &file.service).map(|service| service.method.len());
        assert_eq!(methods.collect::<Vec<_>>(), [5]);
    });
}

async fn health(manager: &Manager, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(manager.channel().await).check(request).await.unwrap().into_inner().status()
}

fn wait_for_health(world: &World, manager: &Manager, status: ServingStatus) {
    for service in SERVICES.into_iter().chain([""]) {
        eventually("every service reports the health status", || {
            match world.runtime.block_on(health(manager, service)) {
                now if now == status => Ok(()),
                now => Err(format!("{service:?} is {now:?}, not {status:?}")),
            }
        });
    }
}

#[test]
fn health_follows_etcd_and_calls_fail_fast_without_it() {
    let mut world = World::bare(Backend::Etcd);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({}));
    wait_for_health(&world, &manager, ServingStatus::Serving);
    assert_eq!(manager.get("/healthcheck").ok(), json!({ "status": "ok" }));

    world.etcd.as_mut().unwrap().process.stop().unwrap();
    wait_for_health(&world, &manager, ServingStatus::NotServing);
    let unhealthy = manager.get("/healthcheck");
    assert_eq!((unhealthy.status, &unhealthy.json()["code"]), (503, &json!(14)), "{}", unhealthy.text);
    assert!(unhealthy.json()["message"].as_str().unwrap().contains("etcd"), "{}", unhealthy.text);
    world.runtime.block_on(async {
        let mut client = manager.instances().await;
        // A hanging call would reach this timeout and fail with another code.
        let with_timeout = |message| {
            let mut request = Request::new(message);
            request.set_timeout(Duration::from_secs(15));
            request
        };
        let create = CreateInstanceRequest { challenge_id: "web".into(), source_id: "a".into(), ..Default::default() };
        assert_eq!(client.create_instance(with_timeout(create)).await.unwrap_err().code(), Code::Unavailable);
        let mut request = Request::new(RetrieveInstanceRequest { challenge_id: "web".into(), source_id: "a".into() });
        request.set_timeout(Duration::from_secs(15));
        assert_eq!(client.retrieve_instance(request).await.unwrap_err().code(), Code::Unavailable);
    });
    let refused = manager.get("/api/v1/challenge/web");
    assert_eq!((refused.status, &refused.json()["code"]), (503, &json!(14)), "{}", refused.text);
    assert!(!refused.text.contains("127.0.0.1"), "the message shows an internal address: {}", refused.text);

    world.etcd.as_mut().unwrap().process.start().unwrap();
    wait_for_health(&world, &manager, ServingStatus::Serving);
    eventually("calls succeed again", || {
        let response = manager.create_instance("web", "a");
        if response.status == 200 { Ok(()) } else { Err(response.text) }
    });
    assert_eq!(manager.get("/healthcheck").ok(), json!({ "status": "ok" }));
}

/// Makes a gRPC-web call over HTTP/1.1 and returns the messages and trailers of the response.
fn grpc_web(manager: &Manager, method: &str, message: &[u8]) -> (Vec<Vec<u8>>, String) {
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    let agent: ureq::Agent = ureq::Agent::config_builder().proxy(None).build().new_agent();
    let mut response = agent
        .post(format!("{}/{method}", manager.url))
        .content_type("application/grpc-web+proto")
        .header("x-grpc-web", "1")
        .send(&body[..])
        .unwrap();
    assert_eq!(response.headers()["content-type"], "application/grpc-web+proto");
    // A call that fails before its first message has its status in the headers.
    let status =
        response.headers().get("grpc-status").map(|status| format!("grpc-status:{}", status.to_str().unwrap()));
    let bytes = response.body_mut().read_to_vec().unwrap();
    let (mut rest, mut messages, mut trailers) = (&bytes[..], Vec::new(), status.unwrap_or_default());
    while let Some((head, after)) = rest.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let (frame, after) = after.split_at(length);
        match head[0] {
            0 => messages.push(frame.to_vec()),
            0x80 => trailers.push_str(std::str::from_utf8(frame).unwrap()),
            flags => panic!("unknown frame flags {flags}"),
        }
        rest = after;
    }
    (messages, trailers)
}

#[test]
fn every_transport_returns_the_same_instance() {
    let world = World::bare(Backend::Embedded);
    let manager = world.manager("m1");
    manager.create_challenge("web", &local("web"), &json!({ "timeout": "600s" }));

    let create = CreateInstanceRequest { challenge_id: "web".into(), source_id: "a".into(), ..Default::default() };
    let method = "api.v1.instance.InstanceManager/CreateInstance";
    let (messages, trailers) = grpc_web(&manager, method, &create.encode_to_vec());
    assert!(trailers.contains("grpc-status:0"), "{trailers}");
    let [message] = &messages[..] else { panic!("{} messages", messages.len()) };
    let web = Instance::decode(&message[..]).unwrap();

    let retrieve = RetrieveInstanceRequest { challenge_id: "web".into(), source_id: "a".into() };
    let grpc = world
        .runtime
        .block_on(async { manager.instances().await.retrieve_instance(retrieve).await.unwrap().into_inner() });
    assert_eq!(grpc, web);
    let rest = manager.get("/api/v1/instance/web/a").ok();
    assert_eq!(rest["connectionInfo"], grpc.connection_info);
    assert_eq!(rest["flags"], json!(grpc.flags));

    // A streaming call, and one that is refused.
    let query = QueryInstanceRequest { source_id: "a".into() };
    let (messages, trailers) =
        grpc_web(&manager, "api.v1.instance.InstanceManager/QueryInstance", &query.encode_to_vec());
    assert_eq!((messages.len(), trailers.contains("grpc-status:0")), (1, true), "{trailers}");
    assert_eq!(Instance::decode(&messages[0][..]).unwrap(), grpc);
    let (messages, trailers) = grpc_web(&manager, method, &create.encode_to_vec());
    assert!(messages.is_empty() && trailers.contains("grpc-status:6"), "{trailers}");
}
