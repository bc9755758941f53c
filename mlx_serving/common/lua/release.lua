-- Hands jobs back to their queues, uncharged: drain, no room, or too big for this worker.
-- ARGV: P R worker iso, then id epoch nonce needed_tokens needed_rows a job (0: unknown, leave as it is).
-- Returns per job 'OK' | 'DUP' (already queued) | 'FENCED'.
local worker, iso = ARGV[3], ARGV[4]
local replies = {}

local function release(id, epoch, nonce, needed, rows)
  local c = read_fields(id, 'st', 'ep', 'ow', 'no', 'q', 'ca')
  if not runs(c, worker, epoch, nonce) then
    return c.st == 'queued' and is_attempt(c, epoch, nonce) and 'DUP' or 'FENCED'
  end
  if c.ca and c.ca ~= '' then  -- cancelled meanwhile: nobody needs to claim it again to find out
    local state = state_for(c.ca)
    finalize_unowned(id, c.q, state, state == 'expired' and c.ca or 'cancelled', c.ca, iso, now_ms())
  else
    if needed > 0 then redis.call('HSET', k_job(id), 'nd', int(needed)) end
    if rows > 0 then redis.call('HSET', k_job(id), 'nr', int(rows)) end
    requeue(id, c.q, worker, epoch)
  end
  return 'OK'
end

for i = 5, #ARGV, 5 do
  replies[#replies + 1] = release(ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]))
end
return replies
