//! The threads that read hyperstart's channels.

use std::io::Read;

use super::super::frames::{read_control, read_stream, FromGuest};
use super::super::messages::Event;
use super::{Key, Shared, State, KEPT};

pub(super) fn read_commands(shared: &Shared, from: &mut impl Read) {
    loop {
        match read_control(from) {
            Ok(FromGuest::Ready) => shared.change(|s| s.ready = true),
            Ok(FromGuest::Next(n)) => {
                shared.change(|s| s.unread = s.unread.saturating_sub(n as usize));
            }
            Ok(FromGuest::Ack(payload)) => shared.change(|s| s.answer = Some(Ok(payload))),
            Ok(FromGuest::Error(payload)) => shared.change(|s| s.answer = Some(Err(payload))),
            Ok(FromGuest::Event(payload)) => shared.change(|s| ended(s, &payload)),
            Ok(FromGuest::Unknown(code)) => {
                log::warn!("hyperstart sent a message of unknown type {code}");
            }
            Err(e) => return shared.broke(&format!("hyperstart's control channel ended: {e}")),
        }
    }
}

fn ended(state: &mut State, payload: &[u8]) {
    let Ok(event) = serde_json::from_slice::<Event>(payload) else {
        return log::warn!("hyperstart sent an event that is no JSON");
    };
    let key = Key { container: event.container, process: event.process };
    if let Some(process) = state.processes.get_mut(&key).filter(|_| event.event == "finished") {
        process.code = Some(event.status);
    }
}

pub(super) fn read_bytes(shared: &Shared, from: &mut impl Read) {
    loop {
        let (sequence, data) = match read_stream(from) {
            Ok(frame) => frame,
            Err(e) => {
                let why = format!("hyperstart's stream channel ended: {e}");
                return shared.change(|s| s.stream_ended = Some(why));
            }
        };
        if data.is_empty() {
            shared.change(|s| {
                let mut all = s.processes.values_mut();
                let of = all.find(|p| p.sequences.is_some_and(|q| q.stdio == sequence));
                if let Some(process) = of {
                    process.streams_ended = true;
                }
            });
            continue;
        }
        let mut state = shared.lock();
        while state.streams.get(&sequence).is_some_and(|kept| kept.len() + data.len() > KEPT) {
            if state.broken.is_some() {
                let why = "hyperstart's control channel ended";
                state.stream_ended.get_or_insert(why.into());
                drop(state);
                return shared.news.notify_all();
            }
            state = shared.wait(state);
        }
        // Of a process that nobody asks about any more: nowhere.
        if let Some(kept) = state.streams.get_mut(&sequence) {
            kept.extend(&data);
        }
        drop(state);
        shared.news.notify_all();
    }
}
