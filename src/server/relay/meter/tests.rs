//! The meter, frame by frame.

use super::super::bucket::SECOND;
use super::*;
use crate::config::Config;

fn limits(class: &str) -> Limits {
    let config = Config::parse("c".as_ref(), "").unwrap();
    match class {
        "claimer" => Limits::claimers(&config),
        _ => Limits::strangers(&config),
    }
}

fn header(kind: u8, flags: u8, stream: u32, length: u32) -> Header {
    Header { length, kind, flags, stream }
}

struct Bench {
    limits: Limits,
    user: Account,
    class: Account,
    meter: Meter,
    now: Nanos,
}

impl Bench {
    /// A connection whose SETTINGS are exchanged.
    fn of(class: &str) -> Bench {
        let (limits, now) = (limits(class), 5 * SECOND);
        let (user, class) = (Account::default(), Account::default());
        let mut bench = Bench { limits, user, class, meter: Meter::default(), now };
        assert_eq!(bench.client(kind::SETTINGS, 0, 0, 12), Ok(Pass::Go));
        bench.server(kind::SETTINGS, 0, 0, 6);
        assert_eq!(bench.client(kind::SETTINGS, flag::ACK, 0, 0), Ok(Pass::Go));
        bench
    }

    fn books(&mut self) -> (&mut Meter, Books<'_>) {
        let books = Books {
            limits: &self.limits,
            user: &mut self.user,
            class: &mut self.class,
            now: self.now,
        };
        (&mut self.meter, books)
    }

    fn client(&mut self, kind: u8, flags: u8, stream: u32, length: u32) -> Result<Pass, Excess> {
        let (meter, mut books) = self.books();
        meter.client(&header(kind, flags, stream, length), &mut books)
    }

    fn server(&mut self, kind: u8, flags: u8, stream: u32, length: u32) {
        let (meter, mut books) = self.books();
        meter.server(&header(kind, flags, stream, length), &mut books);
    }

    fn call(&mut self, id: u32) -> Result<Pass, Excess> {
        let began = self.client(kind::HEADERS, flag::END_HEADERS, id, 90);
        if began != Ok(Pass::Go) {
            return began;
        }
        self.client(kind::DATA, flag::END_STREAM, id, 5)
    }

    fn answer(&mut self, id: u32) {
        self.server(kind::HEADERS, flag::END_HEADERS, id, 50);
        self.server(kind::DATA, 0, id, 3000);
        self.server(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, id, 20);
    }

    fn open(&self) -> [usize; 3] {
        [self.meter.streams.open_calls(), self.user.streams, self.class.streams]
    }
}

fn rate_of(excess: Excess) -> (Kind, Whose) {
    let Excess::Rate { kind, whose, .. } = excess else { panic!("{excess:?}") };
    (kind, whose)
}

#[test]
fn a_claimer_makes_twenty_thousand_calls_a_second_with_all_that_clients_send_beside() {
    let mut b = Bench::of("claimer");
    for n in 0..200_000 {
        b.now += SECOND / 20_000;
        let id = 2 * n + 1;
        assert_eq!(b.call(id), Ok(Pass::Go), "{n}");
        b.answer(id);
        // As gRPC's clients do: for each answer a ping, and windows of call and connection.
        assert_eq!(b.client(kind::PING, 0, 0, 8), Ok(Pass::Go), "{n}");
        for stream in [0, id, id] {
            assert_eq!(b.client(8, 0, stream, 4), Ok(Pass::Go), "{n}");
        }
    }
    assert_eq!(b.open(), [0; 3]);
    assert_eq!(b.meter.due(), None);
}

#[test]
fn a_stranger_has_sixteen_calls_at_a_time_and_as_many_as_an_observer_needs() {
    let mut b = Bench::of("stranger");
    for n in 0..16 {
        assert_eq!(b.call(2 * n + 1), Ok(Pass::Go));
    }
    assert_eq!(b.open(), [16; 3]);
    let over = Excess::Streams { whose: Whose::Connection, limit: 16 };
    assert_eq!(b.call(33), Err(over));
    assert_eq!(b.open(), [16; 3], "what is refused is not counted");
    b.answer(1);
    assert_eq!(b.call(33), Ok(Pass::Go));
    (0..17).for_each(|n| b.answer(2 * n + 1));
    assert_eq!((b.open(), b.user.bytes, b.class.bytes), ([0; 3], 0, 0));
    // Fifty a second for a minute.
    for n in 17..3017 {
        b.now += SECOND / 50;
        assert_eq!(b.call(2 * n + 1), Ok(Pass::Go), "{n}");
        b.answer(2 * n + 1);
    }
    let burst = (3017..).find(|n| {
        let passed = b.call(2 * n + 1);
        b.answer(2 * n + 1);
        passed.is_err()
    });
    assert!((150..=201).contains(&(burst.unwrap() - 3017)), "{burst:?}");
}

#[test]
fn resets_beyond_a_small_number_are_too_many() {
    for (class, most) in [("stranger", 16), ("claimer", 128)] {
        let mut b = Bench::of(class);
        let mut id = 1;
        let over = loop {
            assert_eq!(b.client(kind::HEADERS, flag::END_HEADERS, id, 90), Ok(Pass::Go));
            match b.client(kind::RST_STREAM, 0, id, 4) {
                Ok(_) => id += 2,
                Err(e) => break e,
            }
        };
        assert_eq!(rate_of(over), (Kind::Resets, Whose::Connection));
        assert_eq!(id / 2, most, "{class}");
    }
}

#[test]
fn a_user_has_no_more_by_having_many_connections() {
    let mut b = Bench::of("stranger");
    let mut shut = 0;
    for _ in 0..8 {
        b.meter = Meter { begun: true, acknowledged: true, ..Meter::default() };
        for n in 0..15 {
            let id = 2 * n + 1;
            let began = b.client(kind::HEADERS, flag::END_HEADERS, id, 90);
            let reset = began.and_then(|_| b.client(kind::RST_STREAM, 0, id, 4));
            if let Err(e) = reset {
                assert_eq!(rate_of(e), (Kind::Resets, Whose::User));
                shut += 1;
                break;
            }
        }
    }
    assert_eq!(shut, 6);
}

#[test]
fn floods_of_control_frames_are_too_many() {
    for class in ["stranger", "claimer"] {
        for (of, kind_of, flags, length) in [
            (kind::PING, Kind::Pings, 0, 8),
            (kind::PING, Kind::Pings, flag::ACK, 8),
            (kind::SETTINGS, Kind::Settings, 0, 6),
            (kind::DATA, Kind::Others, 0, 0),
            (kind::DATA, Kind::Data, 0, 1),
            (8, Kind::Others, 0, 4),
            (2, Kind::Others, 0, 5),
            (0xfa, Kind::Others, 0, MAX_FRAME),
        ] {
            let mut b = Bench::of(class);
            let mut n = 0;
            let over = loop {
                match b.client(of, flags, 0, length) {
                    Ok(_) => n += 1,
                    Err(e) => break e,
                }
                assert!(n <= 10_000, "{class} {of}");
            };
            assert_eq!(rate_of(over), (kind_of, Whose::Connection), "{class} {of} {n}");
            if length == MAX_FRAME {
                assert!(n < 170, "large ones count for more: {n}");
            }
        }
    }
}

#[test]
fn header_blocks_are_bounded_in_bytes_and_frames_and_not_mixed_with_others() {
    let mut b = Bench::of("stranger");
    assert_eq!(b.client(kind::HEADERS, 0, 1, 10), Ok(Pass::Go));
    let other = b.client(kind::PING, 0, 0, 8);
    assert_eq!(other, Err(Excess::Protocol("a header block is not continued")));
    let another = b.client(kind::CONTINUATION, 0, 3, 8);
    assert_eq!(another, Err(Excess::Protocol("a header block is not continued")));
    assert_eq!(b.meter.due().unwrap().0, b.now + 5 * SECOND);
    for _ in 0..3 {
        assert_eq!(b.client(kind::CONTINUATION, 0, 1, 0), Ok(Pass::Go));
    }
    let over = b.client(kind::CONTINUATION, 0, 1, 0);
    assert!(matches!(over, Err(Excess::Block { limit: 4, .. })), "{over:?}");
    let mut b = Bench::of("stranger");
    assert_eq!(b.client(kind::HEADERS, flag::END_STREAM, 1, 4000), Ok(Pass::Go));
    assert!(b.client(kind::CONTINUATION, 0, 1, 97).is_err());
    assert_eq!(b.client(kind::CONTINUATION, flag::END_HEADERS, 1, 96), Ok(Pass::Go));
    assert_eq!(b.meter.due(), None, "that was all of its request");
    let alone = b.client(kind::CONTINUATION, flag::END_HEADERS, 1, 1);
    assert_eq!(alone, Err(Excess::Protocol("nothing is there to be continued")));
    assert!(b.client(kind::HEADERS, flag::END_HEADERS, 3, 4097).is_err());
}

#[test]
fn settings_are_acknowledged_in_time_and_not_before() {
    let mut b = Bench::of("claimer");
    b.meter = Meter::default();
    let ping = b.client(kind::PING, 0, 0, 8);
    assert_eq!(ping, Err(Excess::Protocol("the first frame is not SETTINGS")));
    assert_eq!(b.client(kind::SETTINGS, 0, 0, 0), Ok(Pass::Go));
    let early = b.client(kind::SETTINGS, flag::ACK, 0, 0);
    assert_eq!(early, Err(Excess::Protocol("SETTINGS are acknowledged that were not sent")));
    b.server(kind::SETTINGS, 0, 0, 6);
    let (until, why) = b.meter.due().unwrap();
    assert_eq!(until, b.now + 2 * SECOND);
    assert!(why.to_string().contains("acknowledgement of the server's SETTINGS"), "{why}");
    // Until then, no more than one call of a usual size or a few.
    let mut b2 = Bench::of("stranger");
    b2.meter = Meter { begun: true, ..Meter::default() };
    let calls = (0..16).take_while(|n| b2.call(2 * n + 1).is_ok()).count();
    assert_eq!(calls, 1024 / 90);
    assert_eq!(b.client(kind::SETTINGS, flag::ACK, 0, 0), Ok(Pass::Go));
    assert_eq!(b.meter.due(), None);
}

#[test]
fn requests_are_bounded_and_come_to_an_end_and_answers_are_taken() {
    let mut b = Bench::of("stranger");
    assert_eq!(b.client(kind::HEADERS, flag::END_HEADERS, 1, 90), Ok(Pass::Go));
    assert_eq!(b.client(kind::DATA, 0, 1, 4000), Ok(Pass::Go));
    assert!(matches!(b.client(kind::DATA, 0, 1, 97), Err(Excess::Request { .. })));
    let (until, why) = b.meter.due().unwrap();
    assert_eq!(until, b.now + 10 * SECOND);
    assert!(why.to_string().contains("end of a request"), "{why}");
    assert_eq!(b.client(kind::DATA, flag::END_STREAM, 1, 96), Ok(Pass::Go));
    assert_eq!(b.meter.due(), None, "it is the server's turn");
    b.now += 60 * SECOND;
    b.server(kind::HEADERS, flag::END_HEADERS, 1, 50);
    assert_eq!(b.meter.due().unwrap().0, b.now + 10 * SECOND);
    assert_eq!(b.user.bytes, 4096);
    b.server(kind::RST_STREAM, 0, 1, 4);
    assert_eq!((b.meter.due(), b.user.bytes), (None, 0));
    // What comes after the end is gRPC's to throw away.
    assert_eq!(b.client(kind::DATA, flag::END_STREAM, 1, 5000), Ok(Pass::Go));
    assert_eq!(b.user.bytes, 0);
}

#[test]
fn a_class_that_has_used_up_what_it_may_waits_and_nobody_is_shut() {
    let mut b = Bench::of("stranger");
    let rate = b.limits.class_rates[Kind::Calls as usize];
    b.class.buckets[Kind::Calls as usize].take(rate, 500, b.now).unwrap();
    let before = (b.meter.buckets, b.user.buckets);
    let Ok(Pass::At(later)) = b.call(1) else { panic!("it does not wait") };
    assert_eq!(later, b.now + SECOND / 1000);
    assert_eq!((b.meter.buckets, b.user.buckets, b.open()), (before.0, before.1, [0; 3]));
    b.now = later;
    assert_eq!(b.call(1), Ok(Pass::Go));
    b.class.streams = STRANGERS;
    b.now += SECOND;
    assert_eq!(b.call(3), Ok(Pass::Crowded));
}

const STRANGERS: usize = super::super::limits::STRANGERS_STREAMS;

#[test]
fn what_is_open_is_taken_out_of_the_accounts_at_the_end() {
    let mut b = Bench::of("claimer");
    for n in 0..100 {
        assert_eq!(b.client(kind::HEADERS, flag::END_HEADERS, 2 * n + 1, 90), Ok(Pass::Go));
        assert_eq!(b.client(kind::DATA, 0, 2 * n + 1, 30), Ok(Pass::Go));
    }
    assert_eq!((b.user.streams, b.class.bytes), (100, 3000));
    b.meter.release(&mut b.user, &mut b.class);
    assert_eq!((b.user.streams, b.class.bytes, b.user.bytes), (0, 0, 0));
    assert!(!b.user.is_idle(b.now) && b.user.is_idle(b.now + SECOND));
}
