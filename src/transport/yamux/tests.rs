//! Both sides of a session against each other, and one against nonsense.

use super::*;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);

/// Frames as Kata 1.13's agent and proxy write them.
const CAPTURED: [([u8; 12], Kind, u16, u32, u32); 4] = [
    ([0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0], Kind::Window, SYN, 1, 0),
    ([0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0], Kind::Window, ACK, 1, 0),
    ([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9], Kind::Data, 0, 1, 9),
    ([0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7], Kind::Ping, SYN, 0, 7),
];

#[test]
fn headers_are_katas() {
    for (bytes, kind, flags, stream, length) in CAPTURED {
        let header = Header { kind, flags, stream, length };
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        assert_eq!(header.encode(), bytes);
    }
    for bad in [[1; HEADER], [0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        assert!(matches!(Header::decode(&bad), Err(End::Nonsense(_))));
    }
}

fn pair() -> (Session, Session, Receiver<Stream>) {
    let (a, b) = UnixStream::pair().unwrap();
    let (server, accepted) = Session::server(b).unwrap();
    (Session::client(a).unwrap(), server, accepted)
}

fn read_all(stream: &Stream) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), [0; 5000]);
    while let Ok(n @ 1..) = stream.read(&mut chunk) {
        all.extend_from_slice(&chunk[..n]);
    }
    all
}

/// More than the window, both ways at once, in two streams, and half-closed.
#[test]
fn streams_carry_more_than_their_windows_both_ways() {
    let (client, _server, accepted) = pair();
    let bytes: Vec<u8> = (0..3 * WINDOW as usize).map(|i| (i % 251) as u8).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let stream = Arc::new(client.open().unwrap());
            let theirs = Arc::new(accepted.recv_timeout(SOON).unwrap());
            let (bytes, echo) = (&bytes, Arc::clone(&theirs));
            scope.spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(n @ 1..) = echo.read(&mut chunk) {
                    echo.write_all(&chunk[..n]).unwrap();
                }
                echo.finish();
            });
            let writer = Arc::clone(&stream);
            scope.spawn(move || {
                writer.write_all(bytes).unwrap();
                writer.finish();
            });
            scope.spawn(move || assert!(read_all(&stream) == *bytes));
        }
    });
}

/// A stream that nobody reads fills its window, and no other stream waits for it.
#[test]
fn a_stream_that_nobody_reads_holds_up_no_other() {
    let (client, _server, accepted) = pair();
    let (stuck, other) = (client.open().unwrap(), client.open().unwrap());
    let [stuck_end, other_end] = [0, 1].map(|_| accepted.recv_timeout(SOON).unwrap());
    stuck.write_all(&vec![1; WINDOW as usize]).unwrap();
    other.write_all(b"through").unwrap();
    let mut got = [0; 7];
    assert_eq!(other_end.read(&mut got).unwrap(), 7);
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| stuck.write_all(b"one more"));
        assert_eq!(stuck_end.read(&mut vec![0; WINDOW as usize]).unwrap(), WINDOW as usize);
        blocked.join().unwrap().unwrap();
    });
    // Torn down from the far end, whoever writes is told.
    stuck_end.close();
    while stuck.write_all(&[0; 1000]).is_ok() {}
}

#[test]
fn a_session_ends_with_its_carrier_and_by_nonsense() {
    let (client, server, accepted) = pair();
    let stream = client.open().unwrap();
    let _theirs = accepted.recv_timeout(SOON).unwrap();
    drop(server);
    assert!(stream.read(&mut [0; 9]).is_err());
    client.ended().recv_timeout(SOON).unwrap_err();
    assert!(client.open().is_err());

    let beyond = Header { kind: Kind::Data, flags: 0, stream: 1, length: WINDOW + 1 };
    let opens = Header { kind: Kind::Window, flags: SYN, stream: 2, length: 0 };
    let away = Header { kind: Kind::GoAway, flags: 0, stream: 0, length: 1 };
    for bad in [beyond.encode(), opens.encode(), away.encode(), [9; HEADER]] {
        let (a, mut b) = UnixStream::pair().unwrap();
        let client = Session::client(a).unwrap();
        let stream = client.open().unwrap();
        b.write_all(&bad).unwrap();
        assert!(stream.read(&mut [0; 9]).is_err(), "{bad:?}");
        assert!(matches!(client.why(), Some(End::Nonsense(_))), "{:?}", client.why());
    }
}

#[test]
fn pings_are_answered_and_streams_are_counted() {
    let (a, mut b) = UnixStream::pair().unwrap();
    let client = Session::client(a).unwrap();
    let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: 77 };
    b.write_all(&ping.encode()).unwrap();
    let mut answer = [0; HEADER];
    b.read_exact(&mut answer).unwrap();
    assert_eq!(Header::decode(&answer).unwrap(), Header { flags: ACK, ..ping });
    let open: Vec<_> = (0..MAX_STREAMS).map(|_| client.open().unwrap()).collect();
    assert!(client.open().is_err());
    drop(open);
    client.open().unwrap();
}
