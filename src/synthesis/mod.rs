//! Making images out of a teacher and, as soon as there is one, the current student.

pub mod batch;
pub mod settings;
