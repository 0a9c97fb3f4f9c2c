//! A bridge for the double of Kata's agent of 1.13: gRPC on the socket of a kata-proxy,
//! ttrpc on the guest's serial port. The host's side is real, from the proxy's options on;
//! the guest's end differs from Kata's in that it speaks ttrpc, and not gRPC in yamux.
//!
//! Every call is passed on as the bytes that it is: messages of 1.x have the same numbers,
//! and the statuses of both protocols as well.

use std::fs;
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use futures_executor::block_on;
use grpcio::{
    pb_de, pb_ser, EnvBuilder, Marshaller, Method, MethodType, RpcContext, RpcStatus,
    RpcStatusCode, ServerBuilder, ServiceBuilder, UnarySink,
};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{raise, Signal};
use protobuf::Message;
use vmcache::proto::empty::Empty;
use vmcache::sys::rpc::serve_connection;
use vmcache::transport::proxy::socket_path;
use vmcache::transport::serial;

use crate::daemon::LONG;

/// Tells this binary that it is the bridge, and with what options.
const OPTIONS: &str = "VMCACHE_TEST_BRIDGE";
/// An option of its own: where it may make files, which its test removes.
const DIR: &str = "-dir";
const AGENT: &str = "grpc.AgentService";
const HEALTH: &str = "grpc.Health";
/// What the host asks an agent of 1.x for.
const CALLS: [(&str, &str, &str); 28] = [
    (HEALTH, "Check", "/grpc.Health/Check"),
    (HEALTH, "Version", "/grpc.Health/Version"),
    (AGENT, "CreateContainer", "/grpc.AgentService/CreateContainer"),
    (AGENT, "StartContainer", "/grpc.AgentService/StartContainer"),
    (AGENT, "RemoveContainer", "/grpc.AgentService/RemoveContainer"),
    (AGENT, "ExecProcess", "/grpc.AgentService/ExecProcess"),
    (AGENT, "SignalProcess", "/grpc.AgentService/SignalProcess"),
    (AGENT, "WaitProcess", "/grpc.AgentService/WaitProcess"),
    (AGENT, "UpdateContainer", "/grpc.AgentService/UpdateContainer"),
    (AGENT, "StatsContainer", "/grpc.AgentService/StatsContainer"),
    (AGENT, "PauseContainer", "/grpc.AgentService/PauseContainer"),
    (AGENT, "ResumeContainer", "/grpc.AgentService/ResumeContainer"),
    (AGENT, "WriteStdin", "/grpc.AgentService/WriteStdin"),
    (AGENT, "ReadStdout", "/grpc.AgentService/ReadStdout"),
    (AGENT, "ReadStderr", "/grpc.AgentService/ReadStderr"),
    (AGENT, "CloseStdin", "/grpc.AgentService/CloseStdin"),
    (AGENT, "TtyWinResize", "/grpc.AgentService/TtyWinResize"),
    (AGENT, "UpdateInterface", "/grpc.AgentService/UpdateInterface"),
    (AGENT, "UpdateRoutes", "/grpc.AgentService/UpdateRoutes"),
    (AGENT, "ListInterfaces", "/grpc.AgentService/ListInterfaces"),
    (AGENT, "ListRoutes", "/grpc.AgentService/ListRoutes"),
    (AGENT, "ListProcesses", "/grpc.AgentService/ListProcesses"),
    (AGENT, "CreateSandbox", "/grpc.AgentService/CreateSandbox"),
    (AGENT, "DestroySandbox", "/grpc.AgentService/DestroySandbox"),
    (AGENT, "OnlineCPUMem", "/grpc.AgentService/OnlineCPUMem"),
    (AGENT, "ReseedRandomDev", "/grpc.AgentService/ReseedRandomDev"),
    (AGENT, "MemHotplugByProbe", "/grpc.AgentService/MemHotplugByProbe"),
    (AGENT, "GetGuestDetails", "/grpc.AgentService/GetGuestDetails"),
];
/// Those that are not the guest's to refuse when they are missing above.
const MORE: [(&str, &str, &str); 2] = [
    (AGENT, "SetGuestDateTime", "/grpc.AgentService/SetGuestDateTime"),
    (AGENT, "CopyFile", "/grpc.AgentService/CopyFile"),
];

/// A program with kata-proxy's options that is this.
pub fn program(dir: &Path) -> PathBuf {
    let path = dir.join("bridge");
    let this = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\n{OPTIONS}=\"$* {DIR} {}\" exec {} --ignored --exact --nocapture {}\n",
        dir.display(),
        this.display(),
        "doubles::bridge::stands_where_a_proxy_would"
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The process of [`program`].
#[test]
#[ignore = "no test: a process of the doubles'"]
fn stands_where_a_proxy_would() {
    let options = std::env::var(OPTIONS).unwrap_or_else(|_| panic!("{OPTIONS} is not set"));
    let words: Vec<&str> = options.split(' ').collect();
    let option = |name: &str| {
        let at = words.iter().position(|w| *w == name).unwrap_or_else(|| panic!("no {name}"));
        socket_path(words[at + 1]).unwrap()
    };
    let listener = UnixListener::bind(option("-listen-socket")).unwrap();
    // The one port, under the name that our agents' ports have.
    let dir = option(DIR).join(format!("bridge-{}", std::process::id()));
    fs::create_dir(&dir).unwrap();
    symlink(option("-mux-socket"), serial::socket(&dir, 0)).unwrap();
    let guest = serial::open(&dir, LONG, LONG).unwrap_or_else(|_| end());
    end_with(guest.try_clone().unwrap());
    serve(&listener, guest);
}

/// Ends this process when QEMU has closed the port.
fn end_with(guest: UnixStream) {
    thread::spawn(move || {
        let mut closed = [PollFd::new(guest.as_fd(), PollFlags::empty())];
        while !poll(&mut closed, PollTimeout::NONE).is_ok_and(|n| n > 0) {}
        end()
    });
}

/// At once: exit(3) would wait for gRPC's threads, and those for the guest.
fn end() -> ! {
    let _ = raise(Signal::SIGKILL);
    unreachable!("SIGKILL comes first")
}

fn serve(listener: &UnixListener, guest: UnixStream) {
    let client = ttrpc::Client::new(guest.into_raw_fd()).unwrap();
    let mut agent = ServiceBuilder::new();
    for (service, method, name) in CALLS.into_iter().chain(MORE) {
        let call = Method {
            ty: MethodType::Unary,
            name,
            req_mar: Marshaller { ser: pb_ser, de: pb_de },
            resp_mar: Marshaller { ser: pb_ser, de: pb_de },
        };
        let client = client.clone();
        agent = agent.add_unary_handler(
            &call,
            move |_: RpcContext<'_>, request: Empty, sink: UnarySink<Empty>| {
                let client = client.clone();
                // Many calls wait for as long as a process runs.
                thread::spawn(move || pass(&client, (service, method), &request, sink));
            },
        );
    }
    let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
    let mut server =
        ServerBuilder::new(environment).register_service(agent.build()).build().unwrap();
    server.start();
    for client in listener.incoming() {
        serve_connection(&mut server, client.unwrap()).unwrap();
    }
}

/// One call; a message of fields that nobody knows is passed on with them all.
fn pass(
    client: &ttrpc::Client,
    (service, method): (&str, &str),
    request: &Empty,
    sink: UnarySink<Empty>,
) {
    let request = ttrpc::Request {
        service: service.into(),
        method: method.into(),
        payload: request.write_to_bytes().unwrap(),
        ..Default::default()
    };
    // Whoever asked may have gone.
    let _ = match client.request(request) {
        Ok(answer) => block_on(sink.success(Empty::parse_from_bytes(&answer.payload).unwrap())),
        Err(ttrpc::Error::RpcStatus(status)) => {
            let code = RpcStatusCode::from(status.code.value());
            block_on(sink.fail(RpcStatus::with_message(code, status.message)))
        }
        Err(e) => {
            let code = RpcStatusCode::UNAVAILABLE;
            block_on(sink.fail(RpcStatus::with_message(code, e.to_string())))
        }
    };
}
