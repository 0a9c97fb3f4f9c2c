//! Bytes from outside, thrown at what reads them: the entry points that `tests/fuzz`
//! calls, with its own mutations or with libFuzzer's.
//!
//! Each takes any bytes and returns; what it may not do is panic, wait for more than
//! a moment, or keep more memory than [`Target::most`] bytes. In no package (feature
//! `fuzzing`).

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use protobuf::Message;

use crate::agent::address::Address;
use crate::agent::hyperstart::frames::{read_control, read_stream, MAX_CONTROL};
use crate::agent::hyperstart::Hyperstart;
use crate::agent::kata::ttrpc::KataAgent;
use crate::agent::{Agent, Kind};
use crate::config::served::Served;
use crate::config::Config;
use crate::factory::template::Manifest;
use crate::hypervisor::qemu::qmp::{Qmp, MAX_LINE};
use crate::proto::cache::{GrpcVM, GrpcVMConfig};
use crate::proto::control::{ClaimRequest, StatusReply};
use crate::server::relay::frames::{FrameReader, Header};
use crate::server::relay::limits::Limits;
use crate::server::relay::meter::{Account, Books, Meter, Pass};
use crate::transport::frame::{Deframer, HEADER, MAX_PAYLOAD};
use crate::transport::hybrid_vsock::shake_hands;
use crate::transport::yamux::{Session, MAX_STREAMS, WINDOW};
use crate::tree::{self, compressed, Policy, Stop};
use crate::vm::ledger::Ledger;
use crate::vm::{wire, VmConfig};

/// Longest input, in bytes: what fits into a socket's buffer at once.
pub const MAX_INPUT: usize = 64 * 1024;
/// How long what reads may wait for more.
const SOON: Duration = Duration::from_millis(20);
/// What anything takes beside its own bound, bytes.
const SOME: usize = 4 << 20;

/// What the protobuf library takes for a field before it knows that there is so much.
const PROTOBUF: usize = 10_000_000;

/// One that reads bytes from outside.
pub struct Target {
    /// Its name, and its corpus'.
    pub name: &'static str,
    /// Most memory that it takes for one input, bytes.
    pub most: usize,
    /// Reads.
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, most: usize, run: fn(&[u8])) -> Target {
    Target { name, most, run }
}

/// All.
pub static TARGETS: [Target; 17] = [
    target("qmp", 2 * MAX_LINE + SOME, qmp),
    target("ttrpc", PROTOBUF + SOME, ttrpc),
    target("yamux-client", WINDOW as usize * 2 + SOME, yamux_client),
    target("yamux-server", MAX_STREAMS * 4096 + WINDOW as usize * 2 + SOME, yamux_server),
    target("hyperstart", MAX_CONTROL + SOME, hyperstart),
    target("hybrid-vsock", SOME, hybrid_vsock),
    target("http2-frames", SOME, http2_frames),
    target("serial-frames", 4 * (HEADER + MAX_PAYLOAD) + SOME, serial_frames),
    target("grpc-vm", PROTOBUF + SOME, grpc_vm),
    target("vm-config", 2 * SOME, vm_config),
    target("rpc", PROTOBUF + SOME, rpc),
    target("configuration", 4 * SOME, configuration),
    target("ledger", SOME, ledger),
    target("manifest", SOME, manifest),
    target("archive", compressed::MAX_WINDOW as usize + SOME, archive),
    target("tar", tree::MAX_NAMES as usize + SOME, tar),
    target("extract", tree::MAX_NAMES as usize + SOME, extract),
];

/// One end of a connection on which these bytes came, and no more will.
fn said(bytes: &[u8]) -> Option<UnixStream> {
    let (ours, mut theirs) = UnixStream::pair().ok()?;
    theirs.set_write_timeout(Some(SOON)).ok()?;
    theirs.write_all(&bytes[..bytes.len().min(MAX_INPUT)]).ok()?;
    theirs.shutdown(Shutdown::Write).ok()?;
    // Whoever answers meets nobody, as with one that has died.
    Some(ours)
}

fn qmp(bytes: &[u8]) {
    let Some(stream) = said(bytes) else { return };
    let Ok(mut monitor) = Qmp::over(stream, Path::new("fuzz"), SOON) else { return };
    let _ = monitor.running();
    let _ = monitor.version();
}

fn ttrpc(bytes: &[u8]) {
    let (Ok((ours, mut theirs)), true) = (UnixStream::pair(), !bytes.is_empty()) else { return };
    // Said at once, so that the first request already has an answer.
    let _ = theirs.write_all(&bytes[..bytes.len().min(MAX_INPUT)]);
    let _ = theirs.shutdown(Shutdown::Write);
    if let Ok(agent) = KataAgent::over(ours) {
        let _ = agent.check(SOON);
    }
}

fn yamux_client(bytes: &[u8]) {
    let Some(session) = said(bytes).and_then(|s| Session::client(s).ok()) else { return };
    // One that the bytes may be about.
    let stream = session.open();
    let _ = session.ended().recv_timeout(SOON);
    if let Ok(stream) = stream {
        let _ = stream.read(&mut [0; 4096]);
    }
    let _ = session.why();
}

fn yamux_server(bytes: &[u8]) {
    let Some(stream) = said(bytes) else { return };
    let Ok((session, accepted)) = Session::server(stream) else { return };
    let _ = session.ended().recv_timeout(SOON);
    let streams: Vec<_> = accepted.try_iter().collect();
    assert!(streams.len() <= MAX_STREAMS);
}

fn hyperstart(bytes: &[u8]) {
    let mut control = bytes;
    while read_control(&mut control).is_ok() {}
    let mut streams = bytes;
    while read_stream(&mut streams).is_ok() {}
    let (Some(control), Some(stream)) = (said(bytes), said(bytes)) else { return };
    if let Ok(agent) = Hyperstart::over(control, stream) {
        let _ = agent.check(SOON);
    }
}

fn hybrid_vsock(bytes: &[u8]) {
    if let Some(stream) = said(bytes) {
        let _ = shake_hands(stream, 1024, SOON);
    }
}

/// What a client sends through the relay: the same headers and the same verdict however the
/// bytes come, and counts that end at nothing.
fn http2_frames(bytes: &[u8]) {
    let whole = relayed(bytes, bytes.len().max(1));
    for size in [1, 7, 977] {
        assert_eq!(relayed(bytes, size), whole);
    }
    // And as a server's, of which nothing is refused.
    let (mut reader, mut rest) = (FrameReader::server(), bytes);
    while !rest.is_empty() {
        let Ok((n, _)) = reader.read(rest) else { return };
        assert!(n > 0 && (!reader.unfinished() || reader.wanted() > 0));
        rest = &rest[n..];
    }
}

/// Headers that were read, and why no more were.
fn relayed(bytes: &[u8], size: usize) -> (u64, Option<String>) {
    static LIMITS: LazyLock<Option<Limits>> = LazyLock::new(|| {
        Config::parse(Path::new("fuzz.toml"), "").ok().map(|c| Limits::strangers(&c))
    });
    let Some(limits) = &*LIMITS else { return (0, None) };
    let (mut user, mut class) = (Account::default(), Account::default());
    let (mut reader, mut meter) = (FrameReader::client(), Meter::default());
    let settings = Header { length: 0, kind: 4, flags: 0, stream: 0 };
    let mut end = None;
    'all: for chunk in bytes.chunks(size) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let Ok((n, header)) = reader.read(rest) else {
                end = Some("no preface".into());
                break 'all;
            };
            rest = &rest[n..];
            let Some(header) = header else { continue };
            let now = reader.frames();
            let mut books = Books { limits, user: &mut user, class: &mut class, now };
            match meter.client(&header, &mut books) {
                Ok(Pass::Go) => {}
                other => {
                    end = Some(format!("{other:?}"));
                    break 'all;
                }
            }
            // The server says its part.
            match reader.frames() % 5 {
                0 => meter.server(&settings, &mut books),
                n => {
                    let header = Header { kind: n as u8, ..header };
                    meter.server(&header, &mut books);
                }
            }
            assert!(user.streams == meter.streams.open_calls() && user.streams <= limits.streams);
        }
    }
    meter.release(&mut user, &mut class);
    assert_eq!((user.streams, user.bytes, class.streams, class.bytes), (0, 0, 0, 0));
    (reader.frames(), end)
}

fn serial_frames(bytes: &[u8]) {
    let mut deframer = Deframer::new();
    for chunk in bytes.chunks(977) {
        deframer.push(chunk);
        while let Some(frame) = deframer.next_frame() {
            assert!(frame.payload.len() <= MAX_PAYLOAD);
        }
    }
}

fn grpc_vm(bytes: &[u8]) {
    let nothing = || Err::<VmConfig, _>("not asked".to_string());
    if let Ok(message) = GrpcVM::parse_from_bytes(bytes) {
        drop(wire::from_wire(&message, nothing));
    }
    let message = GrpcVM { id: "x".into(), hypervisor: bytes.to_vec(), ..GrpcVM::default() };
    let served = || VmConfig::parse(bytes).map_err(|e| e.to_string());
    drop(wire::from_wire(&message, served));
    let url = String::from_utf8_lossy(bytes);
    for kind in [Kind::Kata, Kind::Kata1, Kind::Hyperstart] {
        let _ = Address::parse(kind, &url);
    }
}

fn vm_config(bytes: &[u8]) {
    let Ok(config) = VmConfig::parse(bytes) else { return };
    // What is told on is what was understood.
    let again = VmConfig::parse(&config.to_json()).unwrap();
    assert_eq!(again.to_json(), config.to_json());
    let _ = (config.memory_backend(), wire::check_server(&config));
    let _ = crate::vm::resize::check(&config, Some(3), Some(777));
}

fn rpc(bytes: &[u8]) {
    let _ = ClaimRequest::parse_from_bytes(bytes);
    let _ = StatusReply::parse_from_bytes(bytes);
    let _ = GrpcVMConfig::parse_from_bytes(bytes);
    let _ = crate::proto::agent::GuestDetailsResponse::parse_from_bytes(bytes);
    let _ = crate::proto::agent::StatsContainerResponse::parse_from_bytes(bytes);
}

fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = Config::parse(Path::new("fuzz.toml"), text) {
        let _ = (crate::config::show(&config), VmConfig::of(&config).to_json());
    }
}

/// A directory of this process's own.
fn place(name: &str) -> PathBuf {
    let path = PathBuf::from(format!("/dev/shm/vmcache-fuzz-{}/{name}", std::process::id()));
    let _ = fs::create_dir_all(&path);
    path
}

fn ledger(bytes: &[u8]) {
    let dir = place("ledger");
    for name in ["vm.json", "claim", "size", "served", "cgroups"] {
        let _ = fs::write(dir.join(name), bytes);
        let _ = Ledger::read(&dir);
        let _ = crate::confine::cgroup::join(&dir);
        if name != "vm.json" {
            continue;
        }
        // The others count beside one that makes sense.
        let sound = r#"{"id":"ledger","state":"ready","pid":1,"start_time":2,"uuid":"","source":"",
            "cpus":1,"memory_mib":1,"endpoint":"","created":1,"owner":null}"#;
        let _ = fs::write(dir.join(name), sound);
    }
    let _ = fs::remove_dir_all(&dir);
}

fn manifest(bytes: &[u8]) {
    let dir = place("manifest");
    let path = dir.join("manifest.json");
    let _ = fs::write(&path, bytes);
    let _ = Manifest::read(&dir);
    let _ = Served::read(&path);
    let _ = fs::remove_dir_all(&dir);
}

/// What a user gives as an archive, compressed or not: decompressed, and measured.
fn archive(bytes: &[u8]) {
    let Ok(mut plain) = compressed::plain(bytes) else { return };
    let _ = tree::measure::measure_tar(&mut plain);
    if let Ok(mut plain) = compressed::plain(bytes) {
        let _ = std::io::copy(&mut (&mut plain).take(4 << 20), &mut std::io::sink());
    }
}

/// Whatever the names say, nothing is written beside the target.
fn tar(bytes: &[u8]) {
    beside_nothing("tar", |target| {
        let _ = tree::unpack(&mut &bytes[..], target, false);
    });
    // Once more with sums that are right: hardly a mutation leaves one so.
    beside_nothing("tar", |target| {
        let _ = tree::unpack(&mut &summed(bytes)[..], target, false);
    });
}

/// The same of the one that does not trust the guest: nor is anything of another name in
/// it, or of another kind, or more than is allowed.
fn extract(bytes: &[u8]) {
    let most = Policy { bytes: 1 << 20, entries: 64, ..Policy::of("t") };
    beside_nothing("extract", |target| {
        let _ = tree::extract(&mut &bytes[..], target, &most, &Stop::default());
        // Once more with sums that are right: hardly a mutation leaves one so.
        let _ = tree::extract(&mut &summed(bytes)[..], target, &most, &Stop::default());
        let _ =
            tree::forward(&mut &summed(bytes)[..], &mut std::io::sink(), &most, &Stop::default());
        let mut left: Vec<PathBuf> = vec![target.to_path_buf()];
        let (mut entries, mut size) = (0, 0);
        while let Some(path) = left.pop() {
            let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o700));
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                assert!(path != target || entry.file_name() == "t");
                let Ok(meta) = entry.path().symlink_metadata() else { continue };
                let kind = meta.file_type();
                assert!(kind.is_file() || kind.is_dir() || kind.is_symlink());
                assert!(kind.is_symlink() || meta.mode() & 0o7000 == 0);
                entries += 1;
                size += if kind.is_file() { meta.len() / meta.nlink() } else { 0 };
                if kind.is_dir() {
                    left.push(entry.path());
                }
            }
        }
        assert!(entries <= 128 && size <= 2 << 20, "{entries} entries, {size} bytes");
    });
}

/// The same blocks, those that look like tar's headers with their sums.
fn summed(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for block in out.chunks_exact_mut(512).filter(|b| b[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    out
}

/// A directory to write to, beside which nothing may change.
fn beside_nothing(name: &str, write: impl FnOnce(&Path)) {
    let around = place(name);
    let target = around.join("target");
    let _ = fs::write(around.join("witness"), "unchanged");
    let _ = fs::create_dir(&target);
    write(&target);
    let mut beside: Vec<_> =
        fs::read_dir(&around).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    beside.sort();
    assert_eq!(beside, ["target", "witness"]);
    let mut witness = String::new();
    let read =
        fs::File::open(around.join("witness")).and_then(|mut f| f.read_to_string(&mut witness));
    assert!(read.is_ok() && witness == "unchanged");
    let _ = fs::remove_dir_all(&around);
}
