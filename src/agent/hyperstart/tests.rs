//! Against a guest that is scripted: it says, frame by frame, what a real one said
//! (tests/fixtures/hyperstart), and takes nothing else than what that one was sent.

use super::frames::{control, stream, FromGuest};
use super::messages::Sequences;
use super::*;
use std::io::{Read, Write};
use std::net::Shutdown;

use crate::worker::Worker;

const CAPTURED: &[u8] = include_bytes!("../../../tests/fixtures/hyperstart/session.json");
const SOON: Duration = Duration::from_secs(20);

#[derive(Clone, Deserialize)]
struct Frame {
    dir: String,
    channel: String,
    hex: String,
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let digits = self.hex.as_bytes().chunks(2);
        digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    fn is(&self, dir: &str, channel: &str) -> bool {
        self.dir == dir && self.channel == channel
    }
}

fn captured() -> Vec<Frame> {
    serde_json::from_slice(CAPTURED).unwrap()
}

/// Plays the guest's part; ends when it has said all.
fn play(frames: Vec<Frame>, mut ctl: UnixStream, mut tty: UnixStream) {
    for (i, frame) in frames.iter().enumerate() {
        let channel = if frame.channel == "ctl" { &mut ctl } else { &mut tty };
        let bytes = frame.bytes();
        if frame.dir == "guest" {
            channel.write_all(&bytes).unwrap();
        } else {
            let mut got = vec![0; bytes.len()];
            channel.read_exact(&mut got).unwrap();
            assert_eq!(got, bytes, "frame {i}");
        }
    }
    let _ = (ctl.shutdown(Shutdown::Both), tty.shutdown(Shutdown::Both));
}

/// The number of a control frame, and its payload.
fn parts(bytes: &[u8]) -> (u32, Vec<u8>) {
    (u32::from_be_bytes(bytes[..4].try_into().unwrap()), bytes[8..].to_vec())
}

/// Whom a command starts: key and streams, as it says itself.
fn started(code: u32, payload: &[u8]) -> Option<(Key, Sequences)> {
    let json: Value = serde_json::from_slice(payload).ok()?;
    let process = &json["process"];
    let container = match code {
        6 => json["container"].as_str()?,
        17 => json["id"].as_str()?,
        _ => return None,
    };
    let key = Key { container: container.into(), process: process["id"].as_str()?.into() };
    let stdio = process["stdio"].as_u64()?;
    Some((key, Sequences { stdio, stderr: process["stderr"].as_u64()? }))
}

#[test]
fn a_session_that_was_captured_runs_again() {
    let frames = captured();
    let ((ctl, ctl_end), (tty, tty_end)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let script = frames.clone();
    let guest = Worker::spawn("scripted", move || play(script, ctl_end, tty_end)).unwrap();
    let session = Session::over(ctl, tty).unwrap();

    let (mut commands, mut refused) = (0, 0);
    for (i, frame) in frames.iter().enumerate() {
        let bytes = frame.bytes();
        if frame.is("host", "tty") {
            let sequence = u64::from_be_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(stream(sequence, &bytes[12..]), bytes);
            session.send(sequence, &bytes[12..]).unwrap();
        }
        if !frame.is("host", "ctl") {
            continue;
        }
        let (code, payload) = parts(&bytes);
        assert_eq!(control(code, &payload), bytes);
        let starts = started(code, &payload);
        if let Some((key, sequences)) = starts.clone() {
            session.remember(key, sequences);
        }
        let answered = session.call_by_number(code, &payload, SOON);
        // ACK is 9 and ERROR is 10.
        let answer = frames[i..].iter().filter(|f| f.is("guest", "ctl")).map(Frame::bytes);
        let (said, with) = answer.map(|b| parts(&b)).find(|(c, _)| [9, 10].contains(c)).unwrap();
        match (said, answered) {
            (9, Ok(payload)) => assert_eq!(payload, with),
            (10, Err(session::Error::Refused(_))) => {
                refused += 1;
                if let Some((key, _)) = starts {
                    session.forget(&key);
                }
            }
            (said, other) => panic!("frame {i}: the guest said {said}, we heard {other:?}"),
        }
        commands += 1;
    }
    guest.join(SOON).unwrap();
    assert!(commands > 60 && refused > 10, "{commands} commands, {refused} refused");

    // What each process wrote, and how it ended.
    let key = |container: &str, process: &str| Key {
        container: container.into(),
        process: process.into(),
    };
    let p1 = key("hyperstart", "p1");
    let Sequences { stdio, stderr } = session.sequences(&p1).unwrap();
    assert_eq!(session.read(&p1, stdio, 100).unwrap(), b"out\n");
    assert_eq!(session.read(&p1, stdio, 100).unwrap(), b"");
    assert_eq!(session.read(&p1, stderr, 100).unwrap(), b"err\n");
    assert_eq!(session.wait(&p1, Some(SOON)).unwrap(), 3);
    assert_eq!(session.wait(&key("hyperstart", "p4"), Some(SOON)).unwrap(), 127);
    assert_eq!(session.wait(&key("hyperstart", "p5"), Some(SOON)).unwrap(), 126);
    let c5 = key("c5", "init");
    let terminal = session.sequences(&c5).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 8 {
        seen.extend(session.read(&c5, terminal.stdio, 100).unwrap());
    }
    assert_eq!(seen, b"hi\r\nhi\r\n");
    assert_eq!(session.wait(&c5, Some(SOON)).unwrap(), 0);
    // The guest is gone now.
    let e = session.call(Code::Ping, &[], SOON).unwrap_err();
    // Told by whoever notices first.
    let told = e.to_string();
    assert!(told.contains("ended") || told.contains("Broken pipe"), "{told}");
}

/// A scripted guest that answers each command with `answer`, and tells what it got.
fn answering(
    answer: impl Fn(u32, &Value) -> Vec<u8> + Send + 'static,
) -> (Hyperstart, Worker<Vec<(u32, Value)>>) {
    let ((ctl, mut end), (tty, _tty_end)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let guest = Worker::spawn("scripted", move || {
        let _kept = _tty_end;
        let mut got = Vec::new();
        let mut header = [0; 8];
        while end.read_exact(&mut header).is_ok() {
            let (code, _) = parts(&header);
            let length = u32::from_be_bytes(header[4..].try_into().unwrap()) as usize - 8;
            let mut payload = vec![0; length];
            for piece in payload.chunks_mut(512 - 8) {
                end.read_exact(piece).unwrap();
                let n = (piece.len() as u32 + 8).to_be_bytes();
                end.write_all(&control(14, &n)).unwrap();
            }
            let json = serde_json::from_slice(&payload).unwrap_or(Value::Null);
            end.write_all(&answer(code, &json)).unwrap();
            got.push((code, json));
        }
        got
    })
    .unwrap();
    (Hyperstart::over(ctl, tty).unwrap(), guest)
}

#[test]
fn what_ends_a_guest_is_not_sent() {
    let (agent, guest) = answering(|_, _| control(9, &[]));
    let sandbox = |hostname: String| CreateSandboxRequest { hostname, ..Default::default() };
    agent.start_sandbox(sandbox("h".repeat(100))).unwrap();
    let again = agent.start_sandbox(sandbox("again".into()));
    assert!(matches!(again, Err(Error::Refused { code: Status::ALREADY_EXISTS, .. })));
    let process = Process { Args: vec!["true".into()], ..Process::default() };
    let id = |exec: &str| ProcessId { container: "c".into(), exec: exec.into() };
    agent.exec(&id("e"), process.clone()).unwrap();
    assert!(agent
        .signal_process(&ProcessId { container: GUEST.into(), exec: "x".into() }, 9)
        .is_err());
    let disk = Storage { driver: "blk".into(), source: "vda".into(), ..Default::default() };
    let root = crate::proto::oci::Root { Path: "/rootfs".into(), ..Default::default() };
    let spec = crate::proto::oci::Spec {
        Process: Some(process).into(),
        Root: Some(root).into(),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: "c".into(),
        storages: vec![disk],
        OCI: Some(spec).into(),
        ..Default::default()
    };
    agent.create_container(request.clone()).unwrap();
    agent.start_container("c").unwrap();
    // It lives: a second one of that name would take its terminals.
    let twice = agent.create_container(request);
    assert!(matches!(twice, Err(Error::Refused { code: Status::ALREADY_EXISTS, .. })));
    agent.disconnect();
    drop(agent);
    let got = guest.join(SOON).unwrap();
    let codes: Vec<_> = got.iter().map(|(code, _)| *code).collect();
    assert_eq!(codes, [1, 6, 17]);
    assert_eq!(got[0].1["hostname"].as_str().unwrap().len(), 64);
}

#[test]
fn an_answer_that_is_late_is_nobody_elses() {
    let (agent, guest) = answering(|code, _| if code == 12 { Vec::new() } else { control(9, &[]) });
    let late = agent.check(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(late, Error::Call { .. }), "{late}");
    let next = agent.online_cpu_mem(1, true).unwrap_err();
    assert!(next.to_string().contains("within 0.1 s"), "{next}");
    drop(agent);
    guest.join(SOON).unwrap();
}

#[test]
fn agent_config_has_katas_keys() {
    let config = serde_json::to_value(HyperConfig::default()).unwrap();
    assert_eq!(config, json!({"SockCtlName": "", "SockTtyName": ""}));
    let mut agent = Hyperstart::at(Address::Hyperstart("/v/x".into()));
    agent.configure_from_grpc(br#"{"SockCtlName":"/c","SockTtyName":"t"}"#).unwrap();
    assert_eq!(agent.config.sockets(Path::new("/v/x")), ("/c".into(), "/v/x/t".into()));
    assert!(agent.configure_from_grpc(b"[]").is_err());
    assert!(agent.configure_from_grpc(&vec![b' '; seat::MAX_CONFIG + 1]).is_err());
}

#[test]
fn every_guest_frame_of_the_capture_is_known() {
    for frame in captured().iter().filter(|f| f.is("guest", "ctl")) {
        let read = frames::read_control(&mut &frame.bytes()[..]).unwrap();
        assert!(!matches!(read, FromGuest::Unknown(_)), "{}", frame.hex);
    }
}
