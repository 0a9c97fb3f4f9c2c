//! The floods themselves. Each runs in up to four processes of its own, which are root's and
//! change their user for each connection: a process can be as many strangers as there are users.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{seteuid, Uid};
use serde_json::{json, Value};

use super::http2::{self, *};

/// Environment of a process that floods: kind, socket, first user, users, milliseconds, units.
pub const VARIABLE: &str = "VMCACHE_FLOOD";

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Calls that stay open.
    Streams,
    /// Calls that are reset at once.
    Resets,
    /// Claims, one after another, each of which is refused.
    Refused,
    /// Connections that make one call and stay.
    Connects,
    /// Connections that say a part of what they must, byte by byte.
    Slow,
    /// Frames of the largest size, in calls that stay open.
    Largest,
    /// SETTINGS, and nothing that is read.
    Settings,
    /// PING, and nothing that is read.
    Pings,
    /// Headers that go on and on.
    Continuations,
    /// Small control frames of all other kinds.
    Control,
    /// Calls without ever acknowledging SETTINGS.
    Unacknowledged,
    /// Answers that are asked for and never read.
    Unread,
    /// The same, by a window of nothing.
    Closed,
    /// Headers that are small and become large.
    Bombs,
}

pub const ALL: [Flood; 14] = [
    Flood::Streams,
    Flood::Resets,
    Flood::Refused,
    Flood::Connects,
    Flood::Slow,
    Flood::Largest,
    Flood::Settings,
    Flood::Pings,
    Flood::Continuations,
    Flood::Control,
    Flood::Unacknowledged,
    Flood::Unread,
    Flood::Closed,
    Flood::Bombs,
];

impl Flood {
    /// How much of it all processes together send at most, in its units, as the issue counts
    /// them: calls, connections, frames.
    pub fn units(self) -> u64 {
        match self {
            Flood::Resets => 60_000,
            Flood::Slow | Flood::Connects => 8_000,
            Flood::Continuations | Flood::Settings | Flood::Pings | Flood::Control => 200_000,
            _ => 20_000,
        }
    }
}

/// Whose a flood is.
#[derive(Clone, Copy, Debug)]
pub struct Users {
    pub first: u32,
    pub number: u32,
}

/// Processes that flood.
pub struct Flooding(Vec<Child>);

/// Begins one, of this many processes.
pub fn begin(
    flood: Flood,
    socket: &Path,
    users: Users,
    time: Duration,
    processes: u64,
) -> Flooding {
    let start = |n: u64| {
        let share = users.number.div_ceil(processes as u32).max(1);
        let first = if users.number == 1 { users.first } else { users.first + n as u32 * share };
        let told = json!({
            "flood": format!("{flood:?}"), "socket": socket, "first": first,
            "number": if users.number == 1 { 1 } else { share },
            "ms": time.as_millis() as u64, "units": flood.units() / processes,
        });
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["stranger::a_process_that_floods", "--exact", "--ignored", "--nocapture"]);
        command.env(VARIABLE, told.to_string()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap()
    };
    Flooding((0..processes).map(start).collect())
}

impl Flooding {
    /// Waits for its end: the sums of what its processes counted, and what they were told.
    pub fn end(self) -> (BTreeMap<String, u64>, Vec<String>) {
        let (mut sums, mut told) = (BTreeMap::new(), Vec::new());
        for child in self.0 {
            let out = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let line = text.lines().find_map(|l| l.split_once("FLOODED ")).map(|(_, l)| l);
            let line = line.unwrap_or_else(|| panic!("a flood failed: {text}"));
            let counts: Value = serde_json::from_str(line).unwrap();
            for (key, n) in counts["counts"].as_object().unwrap() {
                *sums.entry(key.clone()).or_default() += n.as_u64().unwrap();
            }
            for text in counts["told"].as_array().unwrap() {
                told.push(text.as_str().unwrap().to_string());
            }
        }
        told.sort();
        told.dedup();
        (sums, told)
    }
}

struct Flooder {
    socket: PathBuf,
    users: Users,
    turn: u32,
    until: Instant,
    left: u64,
    counts: BTreeMap<&'static str, u64>,
    told: Vec<String>,
    held: Vec<Http>,
}

/// What a process does that is told to flood.
pub fn flood_as_told(text: &str) {
    let told: Value = serde_json::from_str(text).unwrap();
    let number = |key: &str| told[key].as_u64().unwrap();
    let flood = ALL.into_iter().find(|f| told["flood"] == format!("{f:?}")).unwrap();
    let mut flooder = Flooder {
        socket: told["socket"].as_str().unwrap().into(),
        users: Users { first: number("first") as u32, number: number("number") as u32 },
        turn: 0,
        until: Instant::now() + Duration::from_millis(number("ms")),
        left: number("units"),
        counts: BTreeMap::new(),
        told: Vec::new(),
        held: Vec::new(),
    };
    while flooder.goes_on() {
        flooder.once(flood);
    }
    while Instant::now() < flooder.until {
        // Until all processes are at the end; what is held is held so long.
        std::thread::sleep(Duration::from_millis(20));
    }
    let open =
        flooder.held.iter_mut().map(|h| u64::from(!h.ends(Duration::from_millis(1)))).sum::<u64>();
    flooder.counts.insert("open", open);
    // libtest has begun a line.
    println!("\nFLOODED {}", json!({"counts": flooder.counts, "told": flooder.told}));
}

impl Flooder {
    fn goes_on(&self) -> bool {
        self.left > 0 && Instant::now() < self.until
    }

    fn count(&mut self, what: &'static str, n: u64) {
        *self.counts.entry(what).or_default() += n;
    }

    /// A unit was sent.
    fn sent(&mut self, n: u64) {
        self.left = self.left.saturating_sub(n);
        self.count("sent", n);
    }

    /// A connection of the next user.
    fn connect(&mut self, open: impl Fn(&Path) -> std::io::Result<Http>) -> Option<Http> {
        let uid = self.users.first + self.turn % self.users.number;
        self.turn += 1;
        seteuid(Uid::from_raw(uid)).unwrap();
        let http = open(&self.socket);
        seteuid(Uid::from_raw(0)).unwrap();
        self.count("connects", 1);
        match http {
            Ok(http) => Some(http),
            Err(_) => {
                self.count("no connect", 1);
                // The kernel's queue is full, or the server has no fds.
                std::thread::sleep(Duration::from_millis(1));
                None
            }
        }
    }

    /// It was shut, or is as good as shut.
    fn over(&mut self, mut http: Http) {
        http.hear(Duration::from_millis(1));
        self.count("answers", http.answers);
        self.count("served", http.settings.min(1));
        if let Some(text) = http.goaway {
            self.count("told", 1);
            if !self.told.contains(&text) {
                self.told.push(text);
            }
        }
    }

    /// One connection's worth of it.
    fn once(&mut self, flood: Flood) {
        match flood {
            Flood::Streams | Flood::Unacknowledged => self.calls(flood),
            Flood::Resets => self.frames(Http::open, |http| {
                let id = http.id();
                [headers(id, CONFIG), frame(RST_STREAM, 0, id, &[0, 0, 0, 8])].concat()
            }),
            Flood::Refused => self.refused(),
            Flood::Connects => self.connects(),
            Flood::Slow => self.slow(),
            Flood::Largest => self.largest(),
            Flood::Settings => {
                self.frames(Http::open, |_| frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 1, 0]))
            }
            Flood::Pings => self.frames(Http::open, |_| frame(PING, 0, 0, &[7; 8])),
            Flood::Continuations => self.continuations(),
            Flood::Control => self.frames(Http::open, |http| {
                let id = http.id();
                [
                    frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
                    frame(2, 0, id, &[0, 0, 0, 0, 9]),
                    frame(DATA, 0, id, &[]),
                    frame(0xee, 0, id, &[0; 100]),
                ]
                .concat()
            }),
            Flood::Unread | Flood::Closed => self.unread(flood),
            Flood::Bombs => self.bombs(),
        }
    }

    fn frames(
        &mut self,
        open: impl Fn(&Path) -> std::io::Result<Http>,
        next: impl Fn(&mut Http) -> Vec<u8>,
    ) {
        let Some(mut http) = self.connect(open) else { return };
        while self.goes_on() && !http.ended {
            let some: Vec<u8> = (0..20).flat_map(|_| next(&mut http)).collect();
            if !http.say(&some) {
                break;
            }
            self.sent(20);
        }
        self.over(http);
    }

    /// Without an end of their requests.
    fn calls(&mut self, flood: Flood) {
        let acknowledged = flood == Flood::Streams;
        let open = if acknowledged { Http::open } else { Http::begin };
        let Some(http) = self.connect(open) else { return };
        // Some stay below what is allowed, so that they stay.
        let most = if self.turn % 2 == 0 { 12 } else { u64::MAX };
        self.ask(http, most, |id| headers(id, GET_BASE_VM));
    }

    /// Makes so many calls on a connection, which then stays.
    fn ask(&mut self, mut http: Http, most: u64, call: impl Fn(u32) -> Vec<u8>) {
        let mut sent = 0;
        while self.goes_on() && sent < most {
            let id = http.id();
            if !http.say(&call(id)) {
                break;
            }
            sent += 1;
            self.sent(1);
        }
        match http.ended {
            true => self.over(http),
            false => self.hold(http),
        }
    }

    fn hold(&mut self, http: Http) {
        self.held.push(http);
        if self.held.len() > 500 {
            let oldest = self.held.remove(0);
            self.over(oldest);
        }
    }

    fn refused(&mut self) {
        let Some(mut http) = self.connect(Http::open) else { return };
        while self.goes_on() && !http.ended {
            let calls: Vec<u8> = (0..10)
                .flat_map(|_| {
                    let id = http.id();
                    call(id, GET_BASE_VM)
                })
                .collect();
            if !http.say(&calls) {
                break;
            }
            self.sent(10);
            let wanted = http.answers + 10;
            while http.answers < wanted && !http.ended && self.goes_on() {
                http.hear(Duration::from_millis(100));
            }
        }
        self.over(http);
    }

    fn connects(&mut self) {
        let Some(mut http) = self.connect(Http::connect) else { return };
        let settings = frame(SETTINGS, 0, 0, &[]);
        let id = http.id();
        http.say(&[PREFACE, &settings, &call(id, CONFIG)].concat());
        self.sent(1);
        self.hold(http);
    }

    fn slow(&mut self) {
        // A SETTINGS frame as long as it may be.
        let all = [PREFACE, &frame(SETTINGS, 0, 0, &[0; 504])].concat();
        for http in &mut self.held {
            let at = http.next as usize;
            if at < all.len() && std::io::Write::write(&mut http.stream, &all[at..=at]).is_ok() {
                http.next += 1;
            }
        }
        let Some(mut http) = self.connect(Http::connect) else { return };
        // Nothing, a part of the preface, of SETTINGS' header, of SETTINGS.
        let n = [0, 10, 24 + 5, 24 + 12][self.turn as usize % 4];
        http.say(&all[..n]);
        http.next = n as u32;
        self.sent(1);
        self.hold(http);
    }

    fn largest(&mut self) {
        let Some(mut http) = self.connect(Http::open) else { return };
        let payload = vec![0; 16_384];
        while self.goes_on() && !http.ended {
            let id = http.id();
            let mut call = headers(id, GET_BASE_VM);
            // A message that says it is longer than the window.
            let mut first = payload.clone();
            first[..5].copy_from_slice(&[0, 0, 0, 0xff, 0]);
            call.extend(frame(DATA, 0, id, &first));
            call.extend(frame(DATA, 0, id, &payload).repeat(2));
            if !http.say(&call) {
                break;
            }
            self.sent(4);
        }
        self.over(http);
    }

    fn continuations(&mut self) {
        let Some(mut http) = self.connect(Http::open) else { return };
        let id = http.id();
        http.say(&frame(HEADERS, 0, id, &block(CONFIG)));
        while self.goes_on() && !http.ended {
            let more = frame(CONTINUATION, 0, id, &http2::field(0, "x", "y")).repeat(20);
            if !http.say(&more) {
                break;
            }
            self.sent(20);
        }
        self.over(http);
    }

    fn unread(&mut self, flood: Flood) {
        // INITIAL_WINDOW_SIZE of nothing: gRPC keeps what it would send.
        let window = [0, 4, 0, 0, 0, 0];
        let settings = if flood == Flood::Closed { &window[..] } else { &[] };
        let Some(mut http) = self.connect(Http::connect) else { return };
        http.say(&[PREFACE, &frame(SETTINGS, 0, 0, settings)].concat());
        std::thread::sleep(Duration::from_millis(5));
        http.say(&frame(SETTINGS, ACK, 0, &[]));
        let most = if flood == Flood::Closed { 14 } else { u64::MAX };
        self.ask(http, most, |id| call(id, STATUS));
    }

    fn bombs(&mut self) {
        let acknowledged = self.turn % 2 == 0;
        let open = if acknowledged { Http::open } else { Http::begin };
        let Some(mut http) = self.connect(open) else { return };
        while self.goes_on() && !http.ended {
            let id = http.id();
            let mut bomb = block(GET_BASE_VM);
            // One that fills the table, and is then named by one byte each.
            bomb.extend(http2::field(0x40, "x-bomb", &"v".repeat(600)));
            bomb.extend([0xbe; 3000]);
            if !http.say(&frame(HEADERS, END_HEADERS, id, &bomb)) {
                break;
            }
            self.sent(1);
        }
        self.over(http);
    }
}
