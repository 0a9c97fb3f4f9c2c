//! Kata's agents of 1.x: gRPC through yamux and a proxy process. The agent is a
//! scripted one, a gRPC server of the test's own behind our yamux, where QEMU's
//! serial port would be: the real one is in no distribution. The proxy is real,
//! and so is all of the host's side. `tests/interop/run` walks the real agent.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use grpcio::{EnvBuilder, RpcContext, RpcStatus, RpcStatusCode, Server, ServerBuilder, UnarySink};
use vmcache::agent::address::Address;
use vmcache::agent::seat::{Channel, ProxyCommand, Seat, Way};
use vmcache::agent::{self, Agent, Error, Kind, ListFormat, ProcessId};
use vmcache::process::attendant::Attendant;
use vmcache::proto::agent::*;
use vmcache::proto::agent_grpc::{create_agent_service, AgentService};
use vmcache::proto::empty::Empty;
use vmcache::proto::health::health_check_response::ServingStatus;
use vmcache::proto::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use vmcache::proto::health_grpc::{create_health, Health};
use vmcache::proto::oci::{Linux, LinuxSeccomp, LinuxSyscall, Spec};
use vmcache::sys::rpc::serve_connection;
use vmcache::transport::yamux::{Session, Stream};

use crate::daemon::{wait_for, Dir, LONG};

const SOON: Duration = Duration::from_secs(10);

/// What the agent was asked, and what it is to say.
#[derive(Clone, Default)]
struct Scripted {
    asked: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    fn hear(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }
}

fn answer<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, value: T) {
    let sent = sink.success(value);
    ctx.spawn(async move {
        let _ = sent.await;
    });
}

fn fail<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, code: RpcStatusCode, t: &str) {
    let sent = sink.fail(RpcStatus::with_message(code, t.to_string()));
    ctx.spawn(async move {
        let _ = sent.await;
    });
}

impl Health for Scripted {
    fn check(
        &mut self,
        ctx: RpcContext<'_>,
        _: CheckRequest,
        sink: UnarySink<HealthCheckResponse>,
    ) {
        let status = ServingStatus::SERVING.into();
        answer(&ctx, sink, HealthCheckResponse { status, ..Default::default() });
    }

    fn version(
        &mut self,
        ctx: RpcContext<'_>,
        _: CheckRequest,
        sink: UnarySink<VersionCheckResponse>,
    ) {
        let (grpc_version, agent_version) = ("0.0.1".into(), "1.13.0".into());
        let said = VersionCheckResponse { grpc_version, agent_version, ..Default::default() };
        answer(&ctx, sink, said);
    }
}

impl AgentService for Scripted {
    fn create_container(
        &mut self,
        ctx: RpcContext<'_>,
        r: CreateContainerRequest,
        sink: UnarySink<Empty>,
    ) {
        // In 1.x, field 3 is the system calls; we, of later versions, read flags there.
        let seccomp = &r.OCI.Linux.Seccomp;
        let (calls, ours) = (seccomp.Flags.len(), seccomp.Syscalls.len());
        self.hear(format!("create {} {calls} filters, {ours}", r.container_id));
        answer(&ctx, sink, Empty::new());
    }

    fn signal_process(
        &mut self,
        ctx: RpcContext<'_>,
        r: SignalProcessRequest,
        sink: UnarySink<Empty>,
    ) {
        self.hear(format!("signal {}/{} {}", r.container_id, r.exec_id, r.signal));
        answer(&ctx, sink, Empty::new());
    }

    fn read_stdout(
        &mut self,
        ctx: RpcContext<'_>,
        r: ReadStreamRequest,
        sink: UnarySink<ReadStreamResponse>,
    ) {
        let first = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(format!("read {}/{}", r.container_id, r.exec_id));
            asked.iter().filter(|a| a.starts_with("read")).count() == 1
        };
        match first {
            // More than yamux's window and HTTP/2's, in one answer.
            true => {
                let data = vec![7; r.len as usize];
                answer(&ctx, sink, ReadStreamResponse { data, ..Default::default() });
            }
            // As Go's gRPC says io.EOF.
            false => fail(&ctx, sink, RpcStatusCode::UNKNOWN, "EOF"),
        }
    }

    fn list_processes(
        &mut self,
        ctx: RpcContext<'_>,
        r: ListProcessesRequest,
        sink: UnarySink<ListProcessesResponse>,
    ) {
        let process_list = format!("{} {}", r.format, r.args.join(" ")).into_bytes();
        answer(&ctx, sink, ListProcessesResponse { process_list, ..Default::default() });
    }

    fn create_sandbox(
        &mut self,
        ctx: RpcContext<'_>,
        _: CreateSandboxRequest,
        sink: UnarySink<Empty>,
    ) {
        fail(&ctx, sink, RpcStatusCode::ALREADY_EXISTS, "sandbox is there");
    }
}

/// The guest's end of a serial port.
struct Port {
    _session: Session,
    server: Arc<Mutex<Server>>,
}

impl Port {
    fn serve(script: &Scripted, port: UnixStream) -> Port {
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let server = ServerBuilder::new(environment)
            .register_service(create_agent_service(script.clone()))
            .register_service(create_health(script.clone()))
            .build()
            .unwrap();
        let server = Arc::new(Mutex::new(server));
        let (session, accepted) = Session::server(port).unwrap();
        let serving = Arc::clone(&server);
        thread::spawn(move || {
            for stream in accepted {
                let (ours, theirs) = UnixStream::pair().unwrap();
                serve_connection(&mut serving.lock().unwrap(), theirs).unwrap();
                carry(Arc::new(stream), ours);
            }
        });
        server.lock().unwrap().start();
        Port { _session: session, server }
    }
}

fn carry(stream: Arc<Stream>, socket: UnixStream) {
    use std::io::{Read, Write};
    let (down, mut from) = (Arc::clone(&stream), socket.try_clone().unwrap());
    let mut to = socket;
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut chunk) {
            if to.write_all(&chunk[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut chunk) {
            if down.write_all(&chunk[..n]).is_err() {
                break;
            }
        }
        down.close();
    });
}

/// An agent of 1.x with its proxy, in a VM's directory without a VM.
fn seated(dir: &Path) -> (Box<dyn Agent>, Attendant, UnixStream) {
    let mut agent = agent::new(Kind::Kata1);
    let channels = agent.configure(&Seat { dir: dir.to_path_buf(), way: Way::Serial }).unwrap();
    let [Channel::Port { name, socket }] = &channels[..] else { panic!("{channels:?}") };
    assert_eq!(name, "agent.channel.0");
    let qemu = UnixListener::bind(socket).unwrap();
    let command = ProxyCommand {
        program: PathBuf::from(env!("CARGO_BIN_EXE_vmcache")),
        subcommand: Some("proxy"),
        sandbox: "s".into(),
        debug: false,
        leased: true,
    };
    let proxy = agent.start_proxy(&command).unwrap().unwrap();
    (agent, proxy, qemu.accept().unwrap().0)
}

#[test]
fn an_agent_of_version_1_is_called_through_its_proxy() {
    let dir = Dir::new();
    let (agent, proxy, port) = seated(&dir.0);
    let script = Scripted::default();
    let port = Port::serve(&script, port);
    agent.connect(LONG, true).unwrap();
    assert_eq!(agent.agent_url(), format!("unix://{}/proxy.sock", dir.0.display()));
    agent.check(SOON).unwrap();
    assert_eq!(agent.version().unwrap(), ("0.0.1".into(), "1.13.0".into()));

    let call = LinuxSyscall { Names: vec!["kill".into()], ..Default::default() };
    let seccomp = LinuxSeccomp { Syscalls: vec![call], ..Default::default() };
    let linux = Linux { Seccomp: Some(seccomp).into(), ..Default::default() };
    let mut request = CreateContainerRequest {
        container_id: "c".into(),
        OCI: Some(Spec { Linux: Some(linux).into(), ..Default::default() }).into(),
        ..Default::default()
    };
    agent.create_container(request.clone()).unwrap();
    request.shared_mounts.push(Default::default());
    assert!(matches!(agent.create_container(request), Err(Error::Request { .. })));

    let main = ProcessId { container: "c".into(), exec: String::new() };
    agent.signal_process(&main, 9).unwrap();
    let much = agent.read_process_stdout(&main, 3_000_000).unwrap();
    assert_eq!((much.len(), much[2_999_999]), (3_000_000, 7));
    assert!(agent.read_process_stdout(&main, 10).unwrap().is_empty(), "the end");
    let table = agent.process_list_container("c", ListFormat::Table, &[]).unwrap();
    assert_eq!(table, b"table -ef");
    let json = agent.process_list_container("c", ListFormat::Json, &[]).unwrap();
    assert_eq!(json, b"json ");
    let twice = agent.start_sandbox(CreateSandboxRequest::default());
    let there = ttrpc::Code::ALREADY_EXISTS;
    assert!(matches!(twice, Err(Error::Refused { code, .. }) if code == there));
    // What the script has not, an older agent has not.
    assert!(matches!(agent.pause_container("c"), Err(Error::Unsupported { .. })));
    let asked = script.asked.lock().unwrap().clone();
    assert_eq!(asked, ["create c 1 filters, 0", "signal c/c 9", "read c/c", "read c/c"]);

    // A second client, as a Kata runtime would be one, and the connection passed on.
    let url = Address::parse(Kind::Kata1, &agent.agent_url()).unwrap();
    let mut other = agent::at(Address::Proxy("/nonexistent".into()));
    other.reuse(agent::connect(&url, SOON).unwrap()).unwrap();
    other.check(SOON).unwrap();
    agent.check(SOON).unwrap();

    let memory = fs::read_to_string(format!("/proc/{}/smaps_rollup", proxy.pid())).unwrap();
    // Its program's pages are the file's, and the server's as well.
    let private = memory.lines().filter(|l| l.starts_with("Private_Dirty"));
    let kib: u64 =
        private.map(|l| l.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum();
    assert!(kib < 2048, "{kib} KiB of private memory");

    // QEMU ends: so does the proxy, and whoever asks is told at once.
    drop(port.server);
    drop(port._session);
    wait_for("the proxy's end", || !proxy.alive());
    assert!(!dir.0.join("proxy.sock").exists());
    let e = agent.check(SOON).unwrap_err();
    assert!(matches!(e, Error::Call { .. }), "{e}");
}

#[test]
fn a_proxy_is_kata_proxy_by_its_options() {
    let dir = Dir::new();
    let link = dir.0.join("kata-proxy");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vmcache"), &link).unwrap();
    let run = |args: &[&str]| std::process::Command::new(&link).args(args).output().unwrap();
    let said = |out: &std::process::Output| String::from_utf8_lossy(&out.stderr).into_owned();
    let out = run(&["-listen-socket", "unix:///x/p.sock", "-mux-socket", "/nonexistent/kata.sock"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(said(&out).contains("connect to QEMU at /nonexistent/kata.sock"), "{}", said(&out));
    let out = run(&["-listen-socket=tcp://x", "-mux-socket", "/m"]);
    assert_eq!(out.status.code(), Some(2), "{}", said(&out));
    // A socket of somebody else is not taken away.
    let qemu = UnixListener::bind(dir.0.join("kata.sock")).unwrap();
    let taken = UnixListener::bind(dir.0.join("p.sock")).unwrap();
    let (mux, listen) = (dir.0.join("kata.sock"), dir.0.join("p.sock"));
    let out =
        run(&["-mux-socket", mux.to_str().unwrap(), "-listen-socket", listen.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(said(&out).contains("listen on"), "{}", said(&out));
    drop((qemu, taken));
    assert!(listen.exists());
}
