//! A scripted monitor plays what a real QEMU can not be made to say.

use super::*;

/// Answers each request with the next of `script`; keeps the socket open.
#[allow(clippy::disallowed_methods)] // A test's own thread.
fn monitor(greeting: &str, script: Vec<&'static str>) -> Qmp {
    connect(greeting, script, Duration::from_secs(5)).unwrap()
}

#[allow(clippy::disallowed_methods)]
fn connect(greeting: &str, script: Vec<&'static str>, within: Duration) -> Result<Qmp, Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(greeting.as_bytes()).unwrap();
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        for answer in script {
            if theirs.read(&mut chunk).unwrap_or(0) == 0 {
                return;
            }
            // In two pieces, to show that a line may come in parts.
            let (a, b) = answer.split_at(answer.len() / 2);
            let _ = theirs.write_all(a.as_bytes());
            let _ = theirs.write_all(b.as_bytes());
        }
        let _ = theirs.read(&mut chunk);
    });
    Qmp::over(ours, Path::new("qmp.sock"), within)
}

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 1}}, \"capabilities\": []}}\r\n";
const READY: &str = "{\"return\": {}, \"id\": \"vmcache-1\"}\r\n";

#[test]
fn answers_are_matched_and_events_kept() {
    let script = vec![
        READY,
        "{\"event\": \"STOP\"}\r\n{\"return\": 1, \"id\": \"old\"}\r\n{\"return\": {\"status\": \"running\", \"running\": true}, \"id\": \"vmcache-2\"}\r\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": \"vmcache-3\"}\r\n",
    ];
    let mut qmp = monitor(GREETING, script);
    assert_eq!(qmp.version(), "7.2.1");
    assert!(qmp.running().unwrap());
    let event = qmp.next_event("STOP", Instant::now(), Duration::ZERO).unwrap();
    assert_eq!(event["event"], "STOP");
    let e = qmp.quit().unwrap_err().to_string();
    assert_eq!(e, "QEMU refused quit: no (GenericError)");
}

#[test]
fn garbage_silence_and_endless_lines_are_errors() {
    let within = Duration::from_secs(20);
    let e = connect("hello\n", vec![], within).unwrap_err();
    assert!(e.to_string().contains("not JSON"), "{e}");
    let e = connect("{\"no\": 1}\n", vec![], within).unwrap_err();
    assert!(e.to_string().contains("no greeting"), "{e}");
    let e = connect("", vec![], Duration::from_millis(200)).unwrap_err();
    assert!(matches!(e, Error::Silent { .. }), "{e}");
    let mut lines = Lines::default();
    lines.push(&vec![b'x'; MAX_LINE + 1]);
    assert_eq!(lines.next(), Some(Err(TooLong)));
}

#[test]
fn a_late_answer_is_not_lost_to_a_timeout() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(GREETING.as_bytes()).unwrap();
    theirs.write_all(READY.as_bytes()).unwrap();
    let mut qmp = Qmp::over(ours, Path::new("qmp.sock"), Duration::from_secs(5)).unwrap();
    theirs.write_all(b"{\"return\": ").unwrap();
    let e = qmp.execute("a", None, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(e, Error::Silent { .. }));
    theirs
        .write_all(b"7, \"id\": \"vmcache-2\"}\n{\"return\": 8, \"id\": \"vmcache-3\"}\n")
        .unwrap();
    assert_eq!(qmp.execute("b", None, Duration::from_secs(5)).unwrap(), 8);
}
