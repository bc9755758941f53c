-- Renews leases of jobs whose engine made progress, whether or not they emitted.
-- ARGV: P R worker lease_ms, then id epoch a job. Returns per job {status 'OK'|'FENCED', cancel_reason}.
local worker, lease = ARGV[3], tonumber(ARGV[4])
local now = now_ms()
local replies = {}
for i = 5, #ARGV, 2 do
  local id = ARGV[i]
  local c = redis.call('HMGET', k_job(id), 'st', 'ep', 'ow', 'q', 'ca')
  if c[1] == 'running' and c[2] == ARGV[i + 1] and c[3] == worker then
    redis.call('ZADD', k_leases(c[4]), int(now + lease), id)
    if c[5] == '' then
      c[5] = stock_verdict(id)
      if c[5] ~= '' then redis.call('HSET', k_job(id), 'ca', c[5]) end
    end
    replies[#replies + 1] = {'OK', c[5] or ''}
  else
    replies[#replies + 1] = {'FENCED', ''}
  end
end
return replies
