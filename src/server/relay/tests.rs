//! The relay between sockets, with the test in gRPC's place.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, Receiver, Sender};

use super::bucket::Rate;
use super::frames::{code, flag, kind, FrameReader, Header, EMPTY_SETTINGS, PREFACE};
use super::limits::{Limits, KINDS};
use super::{Door, Far, Relay};
use crate::config::Config;
use crate::server::numbers::Ranges;
use crate::server::peers::{Class, Peer, Peers};
use crate::worker::Worker;

/// Longest wait for what must come.
const SOON: Duration = Duration::from_secs(20);

struct Given(Sender<(Class, UnixStream)>);

impl Far for Given {
    fn begin(&mut self, class: Class, end: UnixStream) -> io::Result<()> {
        self.0.send((class, end)).map_err(|_| io::Error::other("the test is over"))
    }
}

struct Bench {
    relay: Relay,
    door: Door,
    peers: Peers,
    far: Receiver<(Class, UnixStream)>,
}

impl Bench {
    fn new(change: impl Fn(&mut Limits)) -> Bench {
        let config = Config::parse("c".as_ref(), "").unwrap();
        let mut limits = [Limits::claimers(&config), Limits::strangers(&config)];
        limits.iter_mut().for_each(change);
        let [claimers, strangers] = limits;
        let peers = Peers::new(Ranges::within(1 << 14));
        let (given, far) = bounded(1024);
        let relay = Relay::start(claimers, strangers, &peers, Box::new(Given(given))).unwrap();
        let door = relay.door();
        Bench { relay, door, peers, far }
    }

    /// Without bounds of what is asked for.
    fn boundless() -> Bench {
        Bench::new(|limits| {
            (limits.connection, limits.user) = ([Rate::ANY; KINDS], [Rate::ANY; KINDS]);
            limits.class_rates = [Rate::ANY; KINDS];
            (limits.call_bytes, limits.user_bytes) = (u32::MAX, u64::MAX);
            limits.block_bytes = u32::MAX;
            limits.opens = Rate::ANY;
        })
    }

    /// A client's end.
    fn connect(&self, class: Class) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_read_timeout(Some(SOON)).unwrap();
        near.set_write_timeout(Some(SOON)).unwrap();
        self.door.hand_in(self.door.client(far), Peer { pid: 1, start_time: 1, uid: 7, class });
        near
    }

    fn far_end(&self) -> UnixStream {
        let (_, end) = self.far.recv_timeout(SOON).unwrap();
        end.set_read_timeout(Some(SOON)).unwrap();
        end.set_write_timeout(Some(SOON)).unwrap();
        end
    }

    /// A connection whose SETTINGS are exchanged: the client's end and gRPC's.
    fn open(&self, class: Class) -> (UnixStream, UnixStream) {
        let mut client = self.connect(class);
        client.write_all(&[&PREFACE[..], &EMPTY_SETTINGS].concat()).unwrap();
        let mut grpc = self.far_end();
        assert_eq!(exactly(&mut grpc, 33), [&PREFACE[..], &EMPTY_SETTINGS].concat());
        grpc.write_all(&EMPTY_SETTINGS).unwrap();
        assert_eq!(exactly(&mut client, 9), EMPTY_SETTINGS);
        client.write_all(&frame(kind::SETTINGS, flag::ACK, 0, 0)).unwrap();
        assert_eq!(exactly(&mut grpc, 9), frame(kind::SETTINGS, flag::ACK, 0, 0));
        (client, grpc)
    }

    fn end(self) {
        drop(self.door);
        self.relay.end(Duration::ZERO, SOON);
    }
}

fn exactly(stream: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn frame(kind: u8, flags: u8, stream: u32, length: usize) -> Vec<u8> {
    let mut out = (length as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend((0..length).map(|n| (n * 31 + stream as usize) as u8));
    out
}

/// The frames of what a client read.
fn frames(bytes: &[u8]) -> Vec<Header> {
    let (mut reader, mut at, mut all) = (FrameReader::server(), 0, Vec::new());
    while at < bytes.len() {
        let (n, header) = reader.read(&bytes[at..]).unwrap();
        at += n;
        all.extend(header);
    }
    assert!(!reader.unfinished(), "the last frame is cut off");
    all
}

/// All until the end; a connection that was reset has ended, too.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(e) if e.kind() != io::ErrorKind::ConnectionReset => panic!("{e} after {bytes:?}"),
        _ => bytes,
    }
}

fn goaway_of(bytes: &[u8]) -> (u32, u32, String) {
    let last = frames(bytes).pop().unwrap();
    assert_eq!(last.kind, kind::GOAWAY, "{bytes:?}");
    let payload = &bytes[bytes.len() - last.length as usize..];
    let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
    (number(0), number(4), String::from_utf8(payload[8..].to_vec()).unwrap())
}

#[test]
fn ten_megabytes_each_way_at_once_arrive_as_they_were_sent() {
    let bench = Bench::boundless();
    let (client, grpc) = bench.open(Class::Claimer);
    let call = frame(kind::HEADERS, flag::END_HEADERS, 1, 100);
    let part: Vec<u8> = (0..800).flat_map(|n| frame(kind::DATA, 0, 1, n * 37 % 16_000)).collect();
    let (up, down) = ([call, part.clone(), part.clone()].concat(), part.repeat(2));
    assert!(up.len() > 10_000_000 && down.len() > 10_000_000);
    let carry = |mut stream: UnixStream, bytes: Vec<u8>| {
        let write = move || {
            // In pieces that do not end where frames do.
            bytes.chunks(13_001).for_each(|c| stream.write_all(c).unwrap());
            stream
        };
        Worker::spawn("vmc-test-w", write).unwrap()
    };
    let gather = |mut stream: UnixStream, n: usize| {
        Worker::spawn("vmc-test-r", move || exactly(&mut stream, n)).unwrap()
    };
    let readers = [
        gather(grpc.try_clone().unwrap(), up.len()),
        gather(client.try_clone().unwrap(), down.len()),
    ];
    let writers = [carry(client, up.clone()), carry(grpc, down.clone())];
    let [got_up, got_down] = readers.map(|r| r.join(SOON).unwrap());
    assert!(got_up == up && got_down == down);
    for writer in writers {
        writer.join(SOON).unwrap();
    }
    bench.end();
}

#[test]
fn what_one_side_ends_ends_for_the_other_and_not_before_all_was_said() {
    let bench = Bench::boundless();
    // The client says no more, and still hears.
    let (mut client, mut grpc) = bench.open(Class::Claimer);
    let call = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, 9_000);
    client.write_all(&call).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(rest(&mut grpc) == call);
    let answer = frame(kind::DATA, flag::END_STREAM, 1, 200_000);
    let told = answer.clone();
    let writes = Worker::spawn("vmc-test-w", move || grpc.write_all(&told).unwrap()).unwrap();
    assert!(rest(&mut client) == answer);
    writes.join(SOON).unwrap();

    // gRPC ends with an answer that the client reads late.
    let (mut client, mut grpc) = bench.open(Class::Claimer);
    let answer = frame(kind::DATA, flag::END_STREAM, 1, 60_000);
    grpc.write_all(&answer).unwrap();
    drop(grpc);
    assert!(rest(&mut client) == answer);
    // The client ends at once.
    let (mut client, mut grpc) = bench.open(Class::Stranger);
    client.write_all(&frame(kind::PING, 0, 0, 8)).unwrap();
    drop(client);
    assert_eq!(rest(&mut grpc), frame(kind::PING, 0, 0, 8));
    bench.end();
}

#[test]
fn who_is_not_read_waits_and_loses_nothing() {
    let bench = Bench::boundless();
    for (from, to) in [(0, 1), (1, 0)] {
        let mut ends = <[UnixStream; 2]>::from(bench.open(Class::Claimer));
        let bytes = frame(kind::DATA, 0, 1, 1000);
        ends[from].set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut sent = Vec::new();
        while let Ok(n) = (&ends[from]).write(&bytes) {
            sent.extend_from_slice(&bytes[..n]);
            if n < bytes.len() {
                break;
            }
            assert!(sent.len() < 4 << 20, "it takes without end");
        }
        // Others are served meanwhile.
        let (mut other, mut others) = bench.open(Class::Claimer);
        other.write_all(&bytes).unwrap();
        assert_eq!(exactly(&mut others, bytes.len()), bytes);
        let got = exactly(&mut ends[to], sent.len());
        assert!(got == sent, "{from}");
    }
    bench.end();
}

#[test]
fn who_asks_for_too_much_is_told_once_at_the_end_of_a_frame() {
    let bench = Bench::new(|limits| limits.streams = 2);
    let (mut client, mut grpc) = bench.open(Class::Stranger);
    let call = |id| frame(kind::HEADERS, flag::END_HEADERS, id, 40);
    client.write_all(&[call(1), call(3)].concat()).unwrap();
    assert_eq!(exactly(&mut grpc, 98).len(), 98);
    // gRPC is in the middle of a frame when the third call comes.
    let answer = frame(kind::DATA, 0, 1, 9_000);
    grpc.write_all(&answer[..4_000]).unwrap();
    assert!(exactly(&mut client, 4_000) == answer[..4_000]);
    client.write_all(&[call(5), frame(kind::PING, 0, 0, 8)].concat()).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!((&client).read(&mut [0]).is_err(), "nothing comes between");
    client.set_read_timeout(Some(SOON)).unwrap();
    grpc.write_all(&[&answer[4_000..], &frame(kind::DATA, 0, 1, 50)].concat()).unwrap();
    let told = rest(&mut client);
    assert!(told[..5_009] == answer[4_000..]);
    let (last, why, text) = goaway_of(&told[5_009..]);
    assert_eq!((last, why), (3, code::ENHANCE_YOUR_CALM));
    assert!(text.contains("more than 2 calls at a time on a connection (stranger_max_streams)"));
    assert_eq!(frames(&told[5_009..]).len(), 1, "once");
    assert_eq!(rest(&mut grpc), b"", "nothing of the third call, and the end");
    // And who does not end its frame is not waited for.
    let (mut client, mut grpc) = bench.open(Class::Stranger);
    grpc.write_all(&answer[..4_000]).unwrap();
    assert!(exactly(&mut client, 4_000) == answer[..4_000]);
    let since = Instant::now();
    client.write_all(&[call(1), call(3), call(5)].concat()).unwrap();
    assert_eq!(rest(&mut client), b"");
    assert!(since.elapsed() < Duration::from_secs(5));
    bench.end();
}

#[test]
fn first_bytes_and_settings_come_in_time() {
    let bench = Bench::new(|_| {});
    let since = Instant::now();
    let mut silent = bench.connect(Class::Stranger);
    let mut slow = bench.connect(Class::Claimer);
    slow.write_all(&PREFACE[..20]).unwrap();
    let mut wrong = bench.connect(Class::Claimer);
    wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(goaway_of(&rest(&mut wrong)).1, code::PROTOCOL_ERROR);
    assert!(since.elapsed() < Duration::from_secs(1));
    let mut unacknowledged = bench.connect(Class::Claimer);
    unacknowledged.write_all(&[&PREFACE[..], &EMPTY_SETTINGS].concat()).unwrap();
    let mut grpc = bench.far_end();
    grpc.write_all(&EMPTY_SETTINGS).unwrap();
    let texts = [&mut silent, &mut slow, &mut unacknowledged].map(|s| goaway_of(&rest(s)).2);
    assert!(texts[..2].iter().all(|t| t.contains("no HTTP/2 preface and SETTINGS within 2 s")));
    assert!(texts[2].contains("no acknowledgement of the server's SETTINGS within 2 s"));
    let took = since.elapsed();
    assert!((2..6).contains(&took.as_secs()), "{took:?}");
    assert!(bench.far.is_empty(), "gRPC has seen none of the others");
    bench.end();
}

#[test]
fn a_number_is_the_peers_while_it_is_connected_and_nobodys_then() {
    let bench = Bench::boundless();
    let mut numbers = Vec::new();
    for n in 0..40 {
        let class = if n % 2 == 0 { Class::Claimer } else { Class::Stranger };
        let (client, mut grpc) = bench.open(class);
        let number = grpc.as_raw_fd();
        let name = format!("fd:{number}");
        assert_eq!(bench.peers.find(&name).map(|p| p.class), Some(class));
        assert!(bench.peers.ranges().of(class).contains(&number));
        assert!(!numbers.contains(&number), "used again at once");
        numbers.push(number);
        drop(client);
        assert_eq!(rest(&mut grpc), b"");
        drop(grpc);
        let until = Instant::now() + SOON;
        while bench.peers.find(&name).is_some() {
            assert!(Instant::now() < until, "it is still known");
        }
    }
    bench.end();
}

#[test]
fn a_number_that_could_still_be_grpcs_is_nobody_elses() {
    let bench = Bench::boundless();
    let range = bench.peers.ranges().of(Class::Claimer);
    // gRPC keeps its ends, as while a handler has not ended, though their clients are gone.
    let kept: Vec<_> = (0..20).map(|_| bench.open(Class::Claimer).1).collect();
    let more: Vec<_> = (0..20).map(|_| bench.open(Class::Claimer)).collect();
    let mut all: Vec<i32> =
        kept.iter().chain(more.iter().map(|(_, g)| g)).map(AsRawFd::as_raw_fd).collect();
    assert!(all.iter().all(|n| range.contains(n)));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 40);
    bench.end();
}

/// Two frames of the client's, and calls that stay open, in one piece.
fn calls(n: u32) -> Vec<u8> {
    let calls = (0..n).flat_map(|n| frame(kind::HEADERS, flag::END_HEADERS, 2 * n + 1, 20));
    PREFACE.iter().copied().chain(EMPTY_SETTINGS).chain(calls).collect()
}

#[test]
fn calls_of_connections_that_ended_keep_no_room_from_others() {
    let bench = Bench::new(|limits| {
        // The second has to wait for gRPC, and ends before.
        limits.opens = Rate::new(1, 2);
        (limits.streams, limits.class_streams) = (8, 8);
        (limits.user_streams, limits.user_connections) = (100, 100);
    });
    let mut first = bench.connect(Class::Stranger);
    first.write_all(&calls(1)).unwrap();
    let mut grpc = bench.far_end();
    exactly(&mut grpc, calls(1).len());
    for _ in 0..5 {
        let mut client = bench.connect(Class::Stranger);
        client.write_all(&calls(7)).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
        assert!(client.read(&mut [0]).is_err(), "it waits");
        client.shutdown(Shutdown::Both).unwrap();
        drop(client);
    }
    // The last of these was seen when one that comes later is.
    let mut last = bench.connect(Class::Stranger);
    last.write_all(&calls(7)).unwrap();
    let until = Instant::now() + SOON;
    let mut grpc = loop {
        let mut grpc = bench.far_end();
        let mut got = vec![0; calls(7).len()];
        match grpc.read_exact(&mut got) {
            Ok(()) => break grpc,
            Err(_) => assert!(Instant::now() < until, "it never has its turn"),
        }
    };
    grpc.write_all(&EMPTY_SETTINGS).unwrap();
    assert_eq!(exactly(&mut last, 9), EMPTY_SETTINGS);
    last.write_all(&frame(kind::SETTINGS, flag::ACK, 0, 0)).unwrap();
    exactly(&mut grpc, 9);
    bench.end();
}

#[test]
fn many_at_once_each_have_their_own_bytes() {
    let bench = Bench::new(|limits| {
        (limits.user_connections, limits.class_connections) = (300, 300);
        limits.opens = Rate::ANY;
    });
    let mut pairs: Vec<_> = (0..200).map(|_| bench.open(Class::Claimer)).collect();
    for round in 0..5 {
        for (n, (client, _)) in pairs.iter_mut().enumerate() {
            client.write_all(&frame(kind::PING, 0, 0, 8 + n)).unwrap();
        }
        for (n, (_, grpc)) in pairs.iter_mut().enumerate() {
            let ping = exactly(grpc, 17 + n);
            assert_eq!(ping, frame(kind::PING, 0, 0, 8 + n), "{round}");
            grpc.write_all(&ping).unwrap();
        }
        for (n, (client, _)) in pairs.iter_mut().enumerate() {
            assert_eq!(exactly(client, 17 + n), frame(kind::PING, 0, 0, 8 + n));
        }
    }
    bench.end();
}

#[test]
fn silent_connections_give_way_and_those_that_are_too_many_are_turned_away() {
    let bench = Bench::new(|limits| {
        limits.user_connections = 3;
        limits.opens = Rate::ANY;
    });
    let mut silent: Vec<_> = (0..3).map(|_| bench.connect(Class::Stranger)).collect();
    let (mut client, _grpc) = bench.open(Class::Stranger);
    let told = goaway_of(&rest(&mut silent[0])).2;
    assert!(told.contains("takes this one's place"), "{told}");
    // Claimers have places of their own.
    let mut claimers: Vec<_> = (0..3).map(|_| bench.open(Class::Claimer)).collect();
    for (client, _) in &mut claimers {
        client.write_all(&frame(kind::HEADERS, flag::END_HEADERS, 1, 40)).unwrap();
    }
    for (_, grpc) in &mut claimers {
        exactly(grpc, 49);
    }
    let told = goaway_of(&rest(&mut bench.connect(Class::Claimer))).2;
    assert!(told.contains("more than 3 connections of a user (user_max_connections)"), "{told}");
    client.write_all(&frame(kind::PING, 0, 0, 8)).unwrap();
    bench.end();
}

#[test]
fn at_its_end_what_grpc_has_said_still_arrives_and_newcomers_are_turned_away() {
    let bench = Bench::boundless();
    let (mut client, mut grpc) = bench.open(Class::Claimer);
    let mut arriving = bench.connect(Class::Claimer);
    bench.relay.close();
    assert_eq!(goaway_of(&rest(&mut arriving)).1, code::NO_ERROR);
    assert_eq!(goaway_of(&rest(&mut bench.connect(Class::Claimer))).1, code::NO_ERROR);
    let answer = frame(kind::DATA, flag::END_STREAM, 1, 150_000);
    let told = answer.clone();
    let writes = Worker::spawn("vmc-test-w", move || grpc.write_all(&told).unwrap()).unwrap();
    let reads = Worker::spawn("vmc-test-r", move || rest(&mut client)).unwrap();
    let Bench { relay, .. } = bench;
    relay.end(Duration::from_secs(5), SOON);
    writes.join(SOON).unwrap();
    assert!(reads.join(SOON).unwrap() == answer);
}
